"""Time of a model's phases under each strategy, beside unpruned, random and free pruning.

*Free pruning* is the bound that no strategy before the language model can beat: the same model on
a prompt that has so few visual tokens already, their embeddings given. Its prompts are recorded:
what a handle gave to ``generate`` is given again to the model without one. All settings have a turn
in every round, so a slow spell of the machine hits all of them alike.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from vtprune.engine.instance import now, restore
from vtprune.engine.plan import find_adapter, wrap
from vtprune.engine.report import Report
from vtprune.engine.wrap import Handle
from vtprune.errors import ConfigError, VTPruneError
from vtprune.eval.bench_kernels import MIB
from vtprune.eval.bench_model_inputs import Asked, Made, Size
from vtprune.eval.bench_model_rows import CONTROL, UNPRUNED, Group, Row, Timed, Turn, rows_of
from vtprune.eval.budgets import Point, parse_budget
from vtprune.registry import build

FIRST: dict[str, Any] = {"max_new_tokens": 1, "do_sample": False}
# Shares of which free pruning is timed beside those asked for, so that a curve can be fitted.
LADDER = (0.75, 0.5, 0.25)

Prompt = dict[str, Any]
Call = tuple[Callable[[], Any], Callable[[Any], None]]


class Bench:
    """Measures ``points`` of a model by batch size and resolution.

    Attributes:
        groups: what was measured, one per batch size and resolution.
        words: tokens of a row that are no visual ones.
        refused: why what is not there was left out.
    """

    def __init__(
        self,
        model: Any,
        prompts: Asked | Made,
        points: Sequence[Point],
        *,
        batches: Sequence[int] = (1,),
        sizes: Sequence[Size],
        decode_tokens: int = 16,
        lenient: bool = False,
    ) -> None:
        """Checks every point against the model, and records the prompts of free pruning.

        Args:
            prompts: makes inputs of a batch size and a resolution.
            decode_tokens: tokens after the first one.
            lenient: leave out points that do not fit the model.

        Raises:
            VTPruneError: a strategy does not fit the model, or a budget exceeds its tokens.
        """
        self.model, self.prompts, self.decode_tokens = model, prompts, decode_tokens
        self.adapter, self.lenient = find_adapter(model), lenient
        self.refused: list[str] = []
        self.groups: list[Group] = []
        self.words = 0
        self._calls: list[Call] = []
        fitting = [point for point in points if self._tried(point, self._check, point)]
        for batch in batches:
            for size in sizes:
                where = f"batch {batch}, {size[0]}x{size[1]}"
                try:
                    self._prepare(batch, size, fitting, where)
                except torch.OutOfMemoryError:
                    self.refused.append(f"{where}: out of memory unpruned")
        if not self.groups:
            raise ConfigError(f"Nothing can be measured. {'; '.join(self.refused)}.")

    @property
    def turns(self) -> int:
        """How many turns a round has."""
        return len(self._calls)

    def run(self, rounds: int, advance: Callable[[int], None] = lambda n: None) -> int:
        """Measures ``rounds`` rounds after one of warm-up; returns how many were measured.

        Ctrl-C ends it; what is known are then the rounds before.
        """
        for i in range(rounds + 1):
            try:
                found = []
                for call, _ in self._calls:
                    found.append(call())
                    advance(1)
            except KeyboardInterrupt:
                if i < 2:
                    raise
                return i - 1
            if i:
                for (_, keep), one in zip(self._calls, found, strict=True):
                    keep(one)
        return rounds

    def rows(self) -> list[Row]:
        """Returns what was measured."""
        return [row for group in self.groups for row in rows_of(group)]

    # -- what is measured ------------------------------------------------------------------------

    def _prepare(self, batch: int, size: Size, points: Sequence[Point], where: str) -> None:
        """Adds a group: what each setting keeps, and the prompts of free pruning."""
        inputs = self.prompts(batch, size)
        group = Group(batch, f"{size[0]}x{size[1]}")
        whole, report, _ = self._recorded(inputs, Point("strided", "100%"))
        tokens, self.words = report.of_sample(0)[0], report.text[0]
        free = {tokens: whole}
        group.settings.append(Timed(UNPRUNED, "100%", tokens, tokens))
        unpruned = functools.partial(self._unpruned, inputs, whole)
        calls: list[Call] = [(unpruned, group.settings[0].turns.append)]
        for share in LADDER:
            self._add_free(free, inputs, share)
        for point in points:
            try:
                setting = self._tried(point, self._setting, point, inputs, free)
            except torch.OutOfMemoryError:
                self.refused.append(f"{where}: {point.strategy} {point.budget}: out of memory")
                continue
            if setting is not None:
                group.settings.append(setting)
                turn = functools.partial(self._pruned, point, inputs)
                calls.append((turn, setting.turns.append))
        for n, prompt in free.items():
            group.free[n] = []
            calls.append((functools.partial(self._first_token, prompt), group.free[n].append))
        self.groups.append(group)
        self._calls += calls

    def _tried(self, point: Point, call: Callable[..., Any], *args: Any) -> Any:
        """Returns what a call returns; None, and a note, where a point may be refused and is."""
        try:
            return call(*args)
        except VTPruneError as error:
            if not self.lenient:
                raise
            self.refused.append(f"{point.strategy} {point.budget}: {error}")
            return None

    def _check(self, point: Point) -> bool:
        self._wrap(point).remove()
        return True

    def _setting(self, point: Point, inputs: Prompt, free: dict[int, Prompt]) -> Timed:
        prompt, report, inside = self._recorded(inputs, point)
        tokens, kept = report.of_sample(0)
        short = next((image for image in report.images if image.short), None)
        if short is not None:
            raise ConfigError(
                f"keep={point.budget}, but the {short.what} has {short.tokens - short.fixed} "
                "tokens at this resolution. Give fewer, a share such as 25%, or more pixels."
            )
        setting = Timed(point.strategy, point.budget, tokens, kept)
        if not inside:
            setting.free = n_visual(self.adapter, prompt)
            free.setdefault(setting.free, prompt)
        elif kept < tokens:
            fixed = sum(image.fixed for image in report.images if image.sample == 0)
            share = (kept - fixed) / (tokens - fixed)
            setting.free = self._add_free(free, inputs, share)
        return setting

    def _add_free(self, free: dict[int, Prompt], inputs: Prompt, share: float) -> int:
        """Adds a prompt with this share of the tokens; returns how many a row of it has."""
        prompt, _, _ = self._recorded(inputs, Point(CONTROL, f"{100 * max(share, 1e-4):.6f}%"))
        n = n_visual(self.adapter, prompt)
        free.setdefault(n, prompt)
        return n

    def _recorded(self, inputs: Prompt, point: Point) -> tuple[Prompt, Report, bool]:
        """Returns the prompt that a strategy leaves, its report, and whether it acts inside."""
        with recording(self.model) as seen, self._wrap(point) as handle:
            self.model.generate(**inputs, **FIRST)
            return lean(seen[-1]), handle.report(), handle.acts_inside

    def _wrap(self, point: Point) -> Handle:
        strategy = build(point.strategy)
        budget = {} if strategy.kind == "compute" else parse_budget(point.budget)
        return wrap(self.model, strategy, processor=self.prompts.processor, **budget)

    # -- turns -----------------------------------------------------------------------------------

    def _pruned(self, point: Point, inputs: Prompt) -> Turn:
        """Returns a turn under a strategy; installing and removing it are not counted."""
        with self._wrap(point) as handle:
            ms, mib = self._whole(inputs)
            handle.timing = True
            total = self._first_token({**inputs, **FIRST})
            return Turn({**parts_of(handle.report(), total), **ms}, mib)

    def _unpruned(self, inputs: Prompt, whole: Prompt) -> Turn:
        """Returns a turn of the bare model."""
        ms, mib = self._whole(inputs)
        began = now(self.model.device)
        with torch.no_grad():
            self.adapter.encode(self.adapter.modalities[0], inputs)
        encoder = 1000 * (now(self.model.device) - began)
        parts = {"encoder": encoder, "scoring": 0.0, "compaction": 0.0}
        return Turn({**parts, "prefill": self._first_token(whole), **ms}, mib)

    def _first_token(self, prompt: Prompt) -> float:
        """Returns the milliseconds of ``generate`` up to the first token."""
        began = now(self.model.device)
        self.model.generate(**prompt)
        return 1000 * (now(self.model.device) - began)

    def _whole(self, inputs: Prompt) -> tuple[dict[str, float], float | None]:
        """Returns the milliseconds of a whole call, and of a token after the first; peak MiB."""
        device, tokens = self.model.device, self.decode_tokens + 1
        watch, gpu = Stopwatch(device), device.type == "cuda"
        if gpu:
            gc.collect()  # else what other turns left is counted here
            torch.cuda.reset_peak_memory_stats(device)
        began = now(device)
        self.model.generate(
            **inputs,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            streamer=watch,
        )
        ms = 1000 * (now(device) - began)
        mib = torch.cuda.max_memory_allocated(device) / MIB if gpu else None
        _, first, *_, last = watch.at  # the prompt comes before the first token
        return {
            "decode_per_token": 1000 * (last - first) / self.decode_tokens,
            "end_to_end": ms,
        }, mib


class Stopwatch(BaseStreamer):
    """Notes when ``generate`` hands out the prompt, and then each token."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.at = device, list[float]()

    def put(self, value: Tensor) -> None:
        self.at.append(now(self.device))

    def end(self) -> None:
        """Notes nothing."""


@contextmanager
def recording(model: Any) -> Iterator[list[Prompt]]:
    """Keeps the arguments of ``generate``: of a handle made inside, what it makes of a call."""
    seen: list[Prompt] = []
    undo, original = restore(model, "generate"), model.generate

    @functools.wraps(original)
    def generate(**kwargs: Any) -> Any:
        seen.append(kwargs)
        return original(**kwargs)

    model.generate = generate
    try:
        yield seen
    finally:
        undo()


def lean(prompt: Prompt) -> Prompt:
    """Returns a prompt without what the encoder gives beside the features of visual tokens."""
    features = ("pooler_output", "deepstack_features")
    outputs = {
        name: type(output)(**{k: output[k] for k in features if output.get(k) is not None})
        for name, output in prompt["mm_encoder_outputs"].items()
    }
    return {**prompt, "mm_encoder_outputs": outputs}


def n_visual(adapter: Any, prompt: Prompt) -> int:
    """Returns the visual tokens of a row of a prompt; those of the first, where they differ."""
    placeholders = [modality.placeholder for modality in adapter.modalities]
    first = prompt["input_ids"][0]
    return int(torch.isin(first, torch.tensor(placeholders, device=first.device)).sum())


def parts_of(report: Report, total: float) -> Mapping[str, float]:
    """Returns the milliseconds of each phase of a timed call that took ``total`` ms.

    The prefill is what is neither encoder nor added by the strategy.
    """
    # A part within a part is in that one's time already.
    outer = {
        path: ms for path, ms in report.parts.items() if path.rpartition(".")[0] not in report.parts
    }

    def added(name: str) -> float:
        return sum(ms for path, ms in outer.items() if path.rpartition(".")[2] == name)

    inside = sum(ms for path, ms in outer.items() if path.startswith("encode."))
    parts = {
        "encoder": report.ms["encode"] - inside,
        "scoring": added("score"),
        "compaction": added("compact"),
    }
    return {**parts, "prefill": total - sum(parts.values())}
