"""One batch through a model, wrapped or not: what it answers, what was kept, what it took."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from vtprune.engine.inputs import visual
from vtprune.engine.instance import now
from vtprune.engine.report import Report
from vtprune.engine.wrap import Handle
from vtprune.errors import UnsupportedError
from vtprune.vlm_adapters._base import VLMAdapter


@dataclass(frozen=True)
class Reply:
    """What became of one request.

    ``prompt`` tokens enter the first layer of the language model and ``new`` ones were made. Of
    ``tokens`` visual ones ``kept`` enter a layer on average; ``flops`` is the share of the unpruned
    prefill, None where it is not known, and ``cache`` that of the batch's unpruned cache.
    """

    text: str
    prompt: int
    new: int
    tokens: int
    kept: float
    flops: float | None
    cache: float | None


@dataclass(frozen=True)
class Took:
    """Milliseconds of one call of ``generate``.

    ``first`` of them pass before the first logits, the tower included, and ``prefill`` in the
    language model's run over the prompt; ``score`` is what a strategy needs to read and decide.
    """

    all: float
    first: float
    prefill: float
    score: float


class Stopwatch:
    """When ``generate`` began, when the language model first began, and first ended; seconds."""

    def __init__(self, model: Any, language_model: nn.Module) -> None:
        self.device, self._language_model = model.device, language_model
        self.began = self.entered = self.left = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Times what is inside."""

        def enter(*_: Any) -> None:
            self.entered = self.entered or now(self.device)

        def leave(*_: Any) -> None:
            self.left = self.left or now(self.device)

        hooks = [
            self._language_model.register_forward_pre_hook(enter),
            self._language_model.register_forward_hook(leave),
        ]
        self.began = now(self.device)
        try:
            yield
            self.ended = now(self.device)
        finally:
            for hook in hooks:
                hook.remove()

    def took(self, score: float) -> Took:
        """Returns the times in milliseconds."""
        marks = (self.ended - self.began, self.left - self.began, self.left - self.entered)
        total, first, prefill = (1000 * seconds for seconds in marks)
        return Took(total, first, prefill, score)


def call(
    model: Any,
    adapter: VLMAdapter,
    handle: Handle | None,
    inputs: dict[str, Tensor],
    settings: dict[str, Any],
) -> tuple[Tensor, list[Reply], Took]:
    """Generates answers to a left-padded batch on the model's device.

    Returns:
        The new ids ``[B, T]`` on the CPU, replies without their texts, and the times.
    """
    if handle is not None:
        handle.timing = True
    watch = Stopwatch(model, adapter.language_model)
    with watch.running():
        ids = model.generate(**inputs, **settings)
    new = ids[:, inputs["input_ids"].shape[1] :].cpu()
    lengths = _lengths(new, model.generation_config.eos_token_id)
    replies, score = _whole(adapter, inputs), 0.0
    if handle is not None:
        report = handle.report()
        score = sum(ms for part, ms in report.parts.items() if part.endswith(".score"))
        if report.text:  # else there was nothing to see in the whole batch
            replies = [_pruned(report, row) for row in range(len(new))]
    pairs = zip(replies, lengths, strict=True)
    return new, [replace(reply, new=n) for reply, n in pairs], watch.took(score)


def _whole(adapter: VLMAdapter, inputs: dict[str, Tensor]) -> list[Reply]:
    """Returns the counts of prompts of which nothing leaves."""
    prompts = inputs["attention_mask"].sum(1).tolist()
    tokens = visual(adapter, inputs["input_ids"]).sum(1).tolist()
    pairs = zip(prompts, tokens, strict=True)
    return [Reply("", prompt, 0, seen, float(seen), 1.0, 1.0) for prompt, seen in pairs]


def _pruned(report: Report, row: int) -> Reply:
    """Returns the counts of one row of a wrapped call."""
    tokens, kept = report.of_sample(row)
    try:
        share = round(report.prefill(row).share, 5)
    except UnsupportedError:
        share = None
    prompt = report.text[row] + report.entering(row)[0]
    cache = None if report.cache is None else round(report.cache.share, 5)
    return Reply("", prompt, 0, tokens, kept, share, cache)


def _lengths(new: Tensor, ends: int | list[int] | None) -> list[int]:
    """Returns how many tokens each row of ``[B, T]`` has up to its first end, that included."""
    stops = set() if ends is None else {ends} if isinstance(ends, int) else set(ends)
    found = []
    for row in new.tolist():
        at = next((i for i, token in enumerate(row) if token in stops), None)
        found.append(len(row) if at is None else at + 1)
    return found
