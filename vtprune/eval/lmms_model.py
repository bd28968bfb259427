"""``lmms-eval --model vtprune``: what --model_args may say, and one process among several."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult
from tqdm import tqdm

from vtprune.engine.plan import wrap
from vtprune.errors import ConfigError
from vtprune.eval import shipped
from vtprune.eval.budgets import CEILING, Point, parse_budget, parse_keep, point_of, spell
from vtprune.eval.lmms_chat import Chat
from vtprune.eval.sweep import seeded
from vtprune.registry import build, unknown
from vtprune.registry import spell as spell_strategy
from vtprune.setting import is_setting, read_setting


class VtpruneChat(Chat):
    """The model that lmms-eval makes of ``--model vtprune --model_args ...``.

    Each of several processes, started by torchrun or accelerate, has the whole model on its own
    device, and answers its share of the documents.
    """

    def __init__(
        self,
        pretrained: str = "",
        strategy: str | None = None,
        keep: int | float | str | None = None,
        *,
        device: str | None = None,
        dtype: str = "auto",
        attn_implementation: str | None = None,
        batch_size: int | str = 1,
        seed: int = 0,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        num_frames: int | None = None,
        **others: Any,
    ) -> None:
        """Loads the model, and tries the strategy on it before any data is read.

        Args:
            pretrained: as ``vtprune.eval.load`` takes it: shipped, a directory, or a hub id.
            strategy: a name; with options within quotes, ``'fastv(layers=(3,))'``; or the file of
                a setting, which has the budget too. None = the unpruned model.
            keep: visual tokens that stay per image: 64 is a count, 0.25 and 25% are shares.
            device: as torch names it; ``cuda`` is each process's own. By default that, or ``cpu``.
            dtype: as ``vtprune.eval.load`` takes it.
            attn_implementation: as transformers names it; by default its own choice.
            batch_size: requests at a time.
            seed: of strategies that draw at random; each batch draws anew.
            min_pixels: of an image, where the processor resizes by their number.
            max_pixels: of an image, likewise.
            num_frames: of a video at most, 32 by default.

        Raises:
            ConfigError: an unknown argument, or one that is not understood.
            UnsupportedError: the strategy does not fit the model.
        """
        _refuse(others)
        if not pretrained:
            raise ConfigError("pretrained is missing. Say --model_args pretrained=MODEL,...")
        if shipped.vit(str(pretrained)) is not None:
            raise ConfigError(f"{pretrained} is a ViT, which answers no questions. Choose a VLM.")
        point = asked_point(strategy, keep)
        size = _number("batch_size", batch_size, 1)
        self.seed = _number("seed", seed, 0)
        self.accelerator = Accelerator()
        model, processor = shipped.load(str(pretrained), self._place(device), dtype)
        if attn_implementation is not None:
            _set_attention(model, attn_implementation)
        given = {"min_pixels": min_pixels, "max_pixels": max_pixels, "num_frames": num_frames}
        options = {n: _number(n, value, 1) for n, value in given.items() if value is not None}
        super().__init__(model, processor, size, options)
        self._rank, self._world_size = (
            self.accelerator.process_index,
            self.accelerator.num_processes,
        )
        if point != CEILING:
            self.wrapping = lambda first: self._wrap(point, first)
            self._wrap(point, 0).remove()

    def generate_until(self, requests: Sequence[Any]) -> list[GenerationResult]:  # type: ignore[override]
        with tqdm(total=len(requests), desc="Requests", disable=self.rank != 0) as bar:
            self.advance = bar.update
            return super().generate_until(requests)

    def _wrap(self, point: Point, first: int) -> Any:
        strategy = seeded(point.strategy, self.seed, first)
        budget = {} if strategy.kind == "compute" else parse_budget(point.budget)
        return wrap(self.model, strategy, processor=self.prompter.processor, **budget)

    def _place(self, device: str | None) -> str:
        """Returns the device of this process."""
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda" and self.accelerator.num_processes > 1:
            return f"cuda:{self.accelerator.local_process_index}"
        return str(device)


def asked_point(strategy: str | None, keep: int | float | str | None) -> Point:
    """Returns the point that ``strategy`` and ``keep`` mean, the unpruned one for neither.

    Raises:
        ConfigError: one without the other, where both are needed, or one that is not understood.
    """
    if strategy is None:
        if keep is not None:
            raise ConfigError(f"keep={keep} without a strategy. Say strategy=hiprune or another.")
        return CEILING
    name = str(strategy).strip().strip("'\"")
    if is_setting(name):
        return point_of(read_setting(name, keep=keep))
    computes = build(name).kind == "compute"
    if computes != (keep is None):
        problem = f"takes no keep={keep}, since no token leaves" if computes else "needs keep"
        hint = "Leave it out" if computes else "Say keep=64 for tokens, or keep=0.25 for a share"
        raise ConfigError(f"{name} {problem}. {hint}.")
    return Point(spell_strategy(name), "100%" if computes else spell(parse_keep(str(keep))))


def _refuse(others: dict[str, Any]) -> None:
    known = [n for n in inspect.signature(VtpruneChat).parameters if n != "others"]
    for name in others:
        if name == "max_batch_size":  # lmms-eval's own option
            raise ConfigError("--max_batch_size has no meaning here. Say --batch_size.")
        raise unknown("argument of vtprune in --model_args", name, known)


def _number(name: str, value: Any, least: int) -> int:
    try:
        number = int(value)
    except ValueError:
        number = least - 1
    if number < least or isinstance(value, bool):
        raise ConfigError(f"{name}={value!r} must be a whole number, {least} or more.")
    return number


def _set_attention(model: Any, name: str) -> None:
    try:
        model.set_attn_implementation(name)
    except (ValueError, ImportError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f"attn_implementation={name!r} cannot be used: {reason}") from error
