"""Accuracy against token budget: every point of strategy and budget on the same samples.

Batches are the outer loop, so the points of one batch are measured side by side and an interrupted
run has all of them on the samples so far.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

import vtprune
from vtprune.engine.plan import wrap
from vtprune.engine.vit_handle import ViTHandle
from vtprune.engine.wrap import Handle
from vtprune.errors import UnsupportedError, VTPruneError
from vtprune.eval.budgets import CEILING, FLOOR, Point, parse_budget, split
from vtprune.eval.results import Folder, Settings
from vtprune.eval.rows import Answer, Timing
from vtprune.eval.samples import CLIPS, LMMS, MAX_NEW_TOKENS, TASKS, Asker, Sample, Task, find_tasks
from vtprune.eval.shipped import fingerprint
from vtprune.eval.shipped_vit import Inputs
from vtprune.flops import Cost, Shape
from vtprune.registry import build, read, strategy_class
from vtprune.types import Frames, Strategy

# What answers depend on besides this package; pillow and torchvision make the pixels.
PACKAGES = ("torch", "transformers", "pillow", "torchvision", "numpy")
BESIDE = {
    "mini-vit": ("timm",),
    "mini-clip": ("open_clip_torch",),
    LMMS: ("lmms_eval", "datasets"),
}


class Batch:
    """Samples that go through the model together; their inputs are made once, when first used."""

    def __init__(self, samples: Sequence[Sample], ask: Asker, device: torch.device) -> None:
        self.samples, self._ask, self._device = samples, ask, device

    @cached_property
    def seeing(self) -> dict[str, Tensor]:
        return self._inputs([sample.seen for sample in self.samples])

    @cached_property
    def blind(self) -> dict[str, Tensor]:
        return self._inputs(None)

    def _inputs(self, seen: Any) -> dict[str, Tensor]:
        inputs = self._ask([sample.question for sample in self.samples], seen)
        return {name: value.to(self._device) for name, value in inputs.items()}


class Sweep:
    """Measures ``points`` with one model and writes each batch to the folder when it is done.

    ``known`` are the tasks that it can be asked. ViTs have subclasses of their own.
    """

    known: Mapping[str, Task] = TASKS

    def __init__(
        self,
        model: Any,
        processor: Any,
        points: Sequence[Point],
        settings: Settings,
        *,
        lenient: bool = False,
    ) -> None:
        """Checks every point against the model, before anything is run.

        With ``lenient`` a point that the model or its strategy refuses is left out, and ``refused``
        says why.

        Raises:
            VTPruneError: a task is unknown, a strategy does not fit the model, or a budget exceeds
                its tokens.
        """
        self.model, self.processor, self.settings = model, processor, settings
        self._prepare()
        self.tasks = find_tasks(split(settings.task), self.known)
        self._check_tasks()
        self.refused: dict[Point, str] = {}
        for point in points:
            try:
                if point not in (CEILING, FLOOR):
                    self._try(point)
            except VTPruneError as error:
                if not lenient:
                    raise
                self.refused[point] = str(error)
        self.points = tuple(point for point in points if point not in self.refused)

    def _prepare(self) -> None:
        self.ask = Asker(self.processor, self.settings.hint)

    def _check_tasks(self) -> None:
        """Raises UnsupportedError where the model's processor takes no videos that are asked."""
        if any(task.videos for task in self.tasks):
            self.ask.check_videos()

    def _try(self, point: Point) -> None:
        """Raises VTPruneError where a point does not fit the model or the tasks."""
        with self._wrap(point, 0) as handle:
            steps = handle.steps if isinstance(handle, Handle) else ()
        still = [task.name for task in self.tasks if not task.videos]
        if still and any(Frames() in step.stage.needs for step in steps):
            raise UnsupportedError(
                f"{point.strategy} reduces videos, but {', '.join(still)} has images alone. Use "
                f"another strategy, {CLIPS!r}, or a task of lmms-eval with videos."
            )

    @property
    def gflops(self) -> float | None:
        """What a ViT takes per image when it keeps all; None for other models."""
        return None

    @property
    def batch(self) -> int:
        """How many samples are measured together."""
        return self.settings.batch_size

    @property
    def total(self) -> int:
        """How many answers there will be, old ones too."""
        return self.settings.limit * len(self.points) * len(self.tasks)

    def run(self, folder: Folder, advance: Callable[[int], None] = lambda n: None) -> None:
        """Measures what ``folder`` lacks, of several ranks each its share.

        ``advance`` is told the rows done, by the first rank old ones too, and 0 while it waits.
        """
        missing = self._missing(folder)
        if folder.ranks.first:
            left = sum(len(numbers) * len(todo) for _, numbers, todo in missing)
            advance(self.total - left)
        try:
            for turn, (task, numbers, todo) in enumerate(folder.ranks.share(missing)):
                # Always the whole batch, so that a resumed run repeats the same arithmetic.
                batch = self._load(task, numbers.start, numbers.stop)
                if turn == 0:  # the first call pays for what is set up once
                    self._warm_up(batch)
                for point in todo:
                    self._write(point, batch, folder)
                    advance(len(numbers))
            self.settle(folder, lambda: advance(0))
        except KeyboardInterrupt:
            self.settle(folder)  # launchers interrupt all ranks
            raise

    def _write(self, point: Point, batch: Any, folder: Folder) -> None:
        """Measures a point on a batch; writes the answers and the time that are not there yet."""
        rows, ms = self.measure(point, batch)
        folder.answers.append(rows)
        first = batch.samples[0]
        marks = (first.task, point.strategy, point.budget, first.index)
        folder.timings.append([Timing(*marks, len(rows), ms)])

    def _missing(self, folder: Folder) -> list[tuple[Task, range, list[Point]]]:
        """Returns the batches of which answers or times are missing, and at which points."""
        done, timed, limit = folder.done(), folder.timed(), self.settings.limit
        found = []
        for task in self.tasks:
            for first in range(0, limit, self.batch):
                numbers = range(first, min(first + self.batch, limit))
                todo = [
                    point
                    for point in self.points
                    if set(numbers) - done[task.name, point]
                    or (task.name, point, first) not in timed
                ]
                if todo:
                    found.append((task, numbers, todo))
        return found

    def settle(self, folder: Folder, waiting: Callable[[], None] = lambda: None) -> None:
        """Waits for all ranks and puts their rows together, in one order whoever made them.

        First what is asked for, by task, batch, point and sample, then the folder's other rows.
        """
        folder.ranks.meet("measured", waiting)
        rows = (*folder.answers.rows, *folder.timings.rows)
        points = dict.fromkeys([*self.points, *(row.point for row in rows)])
        point_places = {point: place for place, point in enumerate(points)}
        task_places = {task.name: place for place, task in enumerate(self.tasks)}

        def place(row: Answer | Timing) -> tuple[int, ...]:
            task, point, number = row.key
            at = point_places[point]
            other = at >= len(self.points)
            return other, task_places[task], number // self.batch, at, number

        folder.gather(place)

    def _load(self, task: Task, first: int, end: int) -> Any:
        return Batch(task.load(first, end), self.ask, self.model.device)

    def _warm_up(self, batch: Any) -> None:
        self._generate(batch.seeing)

    def measure(self, point: Point, batch: Any) -> tuple[list[Answer], float]:
        """Returns the answers of one point, and the milliseconds that the model took."""
        if point == FLOOR:
            words, ms = self._generate(batch.blind)
            counts = [(0, 0.0, share) for share in self._blind_shares(batch)]
            blind, seeing = (inputs["input_ids"].shape[1] for inputs in (batch.blind, batch.seeing))
            cache = blind / seeing
        elif point == CEILING:
            words, ms = self._generate(batch.seeing)
            tokens = self._visual(batch.seeing["input_ids"]).sum(dim=1).tolist()
            counts, cache = [(n, float(n), 1.0) for n in tokens], 1.0
        else:
            with self._wrap(point, batch.samples[0].index) as handle:
                words, ms = self._generate(batch.seeing)
                report = handle.report()
            counts = [
                (*report.of_sample(row), _share(partial(report.prefill, row)))
                for row in range(len(words))
            ]
            cache = None if report.cache is None else report.cache.share
        rows = [
            answer_row(sample, point, word, *count, cache=cache)
            for sample, word, count in zip(batch.samples, words, counts, strict=True)
        ]
        return rows, ms

    def _visual(self, ids: Tensor) -> Tensor:
        """Marks the visual tokens of prompts ``[B, L]``."""
        config = self.model.config
        marks = [getattr(config, f"{kind}_token_id", None) for kind in ("image", "video")]
        return torch.isin(ids, torch.tensor([m for m in marks if m is not None]).to(ids))

    def _blind_shares(self, batch: Batch) -> list[float | None]:
        """What the prompts without the images cost of those with them."""
        masks = (inputs["attention_mask"].sum(1).tolist() for inputs in (batch.blind, batch.seeing))

        def cost(words: int, tokens: int) -> Cost:
            shape = Shape.of(self.model.config.get_text_config())
            blind, seeing = (shape.prefill([n] * shape.layers) for n in (words, tokens))
            return Cost(blind, seeing)

        return [_share(partial(cost, *lengths)) for lengths in zip(*masks, strict=True)]

    def _generate(self, inputs: dict[str, Tensor]) -> tuple[list[str], float]:
        began = time.perf_counter()
        words = self.ask.answers(self.model, inputs, self.settings.max_new_tokens)
        return words, 1000 * (time.perf_counter() - began)

    def _wrap(self, point: Point, first: int) -> Handle | ViTHandle:
        strategy = seeded(point.strategy, self.settings.seed, first)
        budget: dict[str, Any] = {} if strategy.kind == "compute" else parse_budget(point.budget)
        if not isinstance(self.processor, Inputs):
            budget["processor"] = self.processor
        return wrap(self.model, strategy, **budget)


def seeded(name: str, seed: int, first: int) -> Strategy:
    """Returns the strategy; one that has a ``seed`` and is given none gets another for each batch.

    A random choice depends on its seed alone, and one choice of places for all images would make
    the baseline a matter of luck.
    """
    cls, given = strategy_class(read(name)[0]), read(name)[1]
    draws = "seed" in cls.options() and "seed" not in given
    return build(name, **({"seed": 1_000_000 * seed + first} if draws else {}))


def settings_of(
    model: nn.Module,
    processor: Any,
    name: str,
    *,
    task: str,
    limit: int,
    batch_size: int,
    seed: int,
    hint: str = "",
) -> Settings:
    """Returns the settings of a sweep of this model.

    Args:
        name: what the model is called in tables.
        task: one name, or some with commas.
        limit: samples per task.
        hint: text after every question.
    """
    vit = processor.name if isinstance(processor, Inputs) else ""
    kind = LMMS if task.startswith(LMMS) else vit
    packages = [*PACKAGES, *BESIDE.get(kind, ())]
    versions = [f"{package} {version(package)}" for package in packages]
    first = next(model.parameters())
    return Settings(
        name,
        fingerprint(model, processor),
        task,
        hint,
        limit,
        batch_size,
        seed,
        0 if kind else MAX_NEW_TOKENS,
        f"{first.device.type} {first.dtype}",  # not its number: ranks have one each
        ", ".join([f"vtprune {vtprune.__version__}", *versions]),
    )


def _share(cost: Callable[[], Cost]) -> float | None:
    try:
        return round(cost().share, 5)
    except UnsupportedError:
        return None


def answer_row(
    sample: Sample,
    point: Point,
    word: str,
    tokens: int,
    kept: float,
    flops: float | None,
    right: bool | None = None,
    cache: float | None = None,
) -> Answer:
    """Returns the row of a sample at a point; ``right`` where it is not the expected word."""
    return Answer(
        sample.task,
        sample.index,
        sample.kind,
        point.strategy,
        point.budget,
        sample.question,
        sample.expected,
        word,
        word == sample.expected if right is None else right,
        tokens,
        round(kept, 2),
        flops,
        None if cache is None else round(cache, 5),
    )
