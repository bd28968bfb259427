"""Accuracy against token budget: every point of strategy and budget on the same samples.

Batches are the outer loop, so the points of one batch are measured side by side and an interrupted
run has all of them on the samples so far.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import vtprune
from vtprune.engine.plan import wrap
from vtprune.engine.wrap import Handle
from vtprune.eval.budgets import CEILING, FLOOR, Point, parse_keep, split
from vtprune.eval.results import Answer, Folder, Settings, Timing
from vtprune.eval.samples import MAX_NEW_TOKENS, Asker, Sample, find_tasks
from vtprune.eval.shipped import fingerprint
from vtprune.registry import build, strategy_class
from vtprune.types import Strategy


class Batch:
    """Samples that go through the model together; their inputs are made once, when first used."""

    def __init__(self, samples: Sequence[Sample], ask: Asker, device: torch.device) -> None:
        self.samples, self._ask, self._device = samples, ask, device

    @cached_property
    def seeing(self) -> dict[str, Tensor]:
        return self._inputs([sample.image for sample in self.samples])

    @cached_property
    def blind(self) -> dict[str, Tensor]:
        return self._inputs(None)

    def _inputs(self, images: Any) -> dict[str, Tensor]:
        inputs = self._ask([sample.question for sample in self.samples], images)
        return {name: value.to(self._device) for name, value in inputs.items()}


class Sweep:
    """Measures ``points`` with one model and writes each batch to the folder when it is done."""

    def __init__(
        self,
        model: PreTrainedModel,
        processor: Any,
        points: Sequence[Point],
        settings: Settings,
    ) -> None:
        """Checks every point against the model, before anything is run.

        Raises:
            VTPruneError: a task is unknown, a strategy does not fit the model, or a budget exceeds
                its tokens.
        """
        self.model, self.points, self.settings = model, tuple(points), settings
        self.tasks = find_tasks(split(settings.task))
        self.ask = Asker(processor)
        for point in self.points:
            if point not in (CEILING, FLOOR):
                self._wrap(point, 0).remove()

    def run(self, folder: Folder, advance: Callable[[int], None] = lambda n: None) -> None:
        """Measures what ``folder`` lacks; ``advance`` is told the rows done, old ones too."""
        done, timed = folder.done(), folder.timed()
        size, limit = self.settings.batch_size, self.settings.limit
        for task in self.tasks:
            for first in range(0, limit, size):
                end = min(first + size, limit)
                todo = [
                    point
                    for point in self.points
                    if set(range(first, end)) - done[task.name, point]
                    or (task.name, point, first) not in timed
                ]
                advance((end - first) * (len(self.points) - len(todo)))
                if todo:
                    # Always the whole batch, so that a resumed run repeats the same arithmetic.
                    batch = Batch(task.load(first, end), self.ask, self.model.device)
                    self._measure_all(todo, batch, folder, done, advance)

    def _measure_all(
        self,
        todo: Sequence[Point],
        batch: Batch,
        folder: Folder,
        done: Mapping[tuple[str, Point], set[int]],
        advance: Callable[[int], None],
    ) -> None:
        """Measures the points on a batch; writes the answers that are new, and the time."""
        first = batch.samples[0]
        for point in todo:
            rows, ms = self.measure(point, batch)
            old = done[first.task, point]
            folder.answers.append([row for row in rows if row.sample not in old])
            timing = Timing(first.task, point.strategy, point.budget, first.index, len(rows), ms)
            folder.timings.append([timing])
            advance(len(rows))

    def measure(self, point: Point, batch: Batch) -> tuple[list[Answer], float]:
        """Returns the answers of one point, and the milliseconds that ``generate`` took."""
        if point == FLOOR:
            words, ms = self._generate(batch.blind)
            counts = [(0, 0)] * len(words)
        elif point == CEILING:
            words, ms = self._generate(batch.seeing)
            placeholder = self.model.config.image_token_id
            tokens = (batch.seeing["input_ids"] == placeholder).sum(dim=1).tolist()
            counts = [(n, n) for n in tokens]
        else:
            with self._wrap(point, batch.samples[0].index) as handle:
                words, ms = self._generate(batch.seeing)
                counts = [(image.tokens, image.kept) for image in handle.report().images]
        rows = [
            _answer(sample, point, word, *count)
            for sample, word, count in zip(batch.samples, words, counts, strict=True)
        ]
        return rows, ms

    def _generate(self, inputs: dict[str, Tensor]) -> tuple[list[str], float]:
        began = time.perf_counter()
        words = self.ask.answers(self.model, inputs, self.settings.max_new_tokens)
        return words, 1000 * (time.perf_counter() - began)

    def _wrap(self, point: Point, first: int) -> Handle:
        strategy = seeded(point.strategy, self.settings.seed, first)
        keep = parse_keep(point.budget)
        return wrap(self.model, strategy, keep=keep, processor=self.ask.processor)


def seeded(name: str, seed: int, first: int) -> Strategy:
    """Returns the strategy; one that has a ``seed`` gets another for each batch.

    A random choice depends on its seed alone, and one choice of places for all images would make
    the baseline a matter of luck.
    """
    options = {"seed": 1_000_000 * seed + first} if "seed" in strategy_class(name).options() else {}
    return build(name, **options)


def settings_of(
    model: PreTrainedModel, name: str, *, task: str, limit: int, batch_size: int, seed: int
) -> Settings:
    """Returns the settings of a sweep of this model; ``task`` is one name or some with commas."""
    versions = " ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    device = str(model.device)
    marks = (MAX_NEW_TOKENS, device, f"vtprune {vtprune.__version__} {versions}")
    return Settings(name, fingerprint(model), task, limit, batch_size, seed, *marks)


def _answer(sample: Sample, point: Point, word: str, tokens: int, kept: int) -> Answer:
    return Answer(
        sample.task,
        sample.index,
        sample.kind,
        point.strategy,
        point.budget,
        sample.question,
        sample.expected,
        word,
        word == sample.expected,
        tokens,
        kept,
    )
