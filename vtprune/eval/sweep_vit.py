"""Sweeps of the shipped ViTs: top-1 of the classifier, recall of the pair of two towers."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vtprune.engine.plan import wrap
from vtprune.engine.vit_wrap import find_vit, home
from vtprune.errors import ConfigError
from vtprune.eval.budgets import CEILING, Point
from vtprune.eval.rows import Answer
from vtprune.eval.samples import Sample, Task
from vtprune.eval.samples_vit import SOUGHT, VIT_TASKS
from vtprune.eval.scene_objects import CLASSES
from vtprune.eval.sweep import Sweep, answer_row
from vtprune.registry import read
from vtprune.strategies.dependencyvit import DependencyViT

Count = tuple[int, float, float]  # visual tokens, those that are left, share of the tower's FLOPs
Ran = tuple[Tensor, float, list[Count]]  # outputs on the host, milliseconds, a count per image


class VitBatch:
    """Samples, and their pixels ``[B, 3, H, W]`` on the model's device."""

    def __init__(self, samples: Sequence[Sample], pixels: Tensor) -> None:
        self.samples, self.pixels = samples, pixels


class VitSweep(Sweep):
    """Runs a ViT on batches; subclasses say what its outputs answer.

    Timed is the tower alone, from pixels on the device to outputs on the host.
    """

    def _prepare(self) -> None:
        first = next(self.model.parameters())
        self._to = {"device": first.device, "dtype": first.dtype}
        self._adapter: Any = find_vit(self.model)
        self._own = DependencyViT().beside(home(self.model))  # with messengers: the ViT is one
        self.known = VIT_TASKS[self.processor.name]

    def _try(self, point: Point) -> None:
        if self._own.messengers is not None and read(point.strategy)[0] != self._own.name:
            raise ConfigError(
                f"{point.strategy} does not fit this ViT, whose attention was trained turned "
                f"around: nothing else than {self._own.name} runs it so. Give --strategy "
                f"{self._own.name}, or another --model."
            )
        blank = self.processor.images([Image.new("RGB", (1, 1))]).to(**self._to)
        self.outputs(point, blank, 0)  # some strategies say only then what they cannot do

    @property
    def gflops(self) -> float:
        adapter = self._adapter
        n, shape = adapter.n_patches + adapter.n_prefix, adapter.shape
        return 2 * shape.prefill([n] * shape.layers) / 1e9

    def _load(self, task: Task, first: int, end: int) -> VitBatch:
        samples = task.load(first, end)
        pixels = self.processor.images([sample.image for sample in samples])
        return VitBatch(samples, pixels.to(**self._to))

    def _warm_up(self, batch: Any) -> None:
        with self._whole():
            self._timed(batch.pixels[: self.settings.batch_size])

    def outputs(
        self, point: Point, pixels: Tensor, first: int
    ) -> tuple[Tensor, float, list[Count]]:
        """Returns the outputs of one point on the host, the milliseconds, and per image a count.

        Args:
            first: number of the first image; strategies that draw draw by it.
        """
        if point == CEILING:
            n = self._adapter.n_patches
            with self._whole():
                return *self._timed(pixels), [(n, float(n), 1.0)] * len(pixels)
        with self._wrap(point, first) as handle:
            found, ms = self._timed(pixels)
            report: Any = handle.report()
        tiles = zip(report.images, report.tiles, strict=True)
        return found, ms, [(i.tokens, float(i.kept), round(t.cost().share, 5)) for i, t in tiles]

    def _whole(self) -> AbstractContextManager[Any]:
        """All patches stay: the bare model, but a DependencyViT is none without its messengers."""
        if self._own.messengers is None:
            return nullcontext()
        return wrap(self.model, self._own, keep=1.0)

    def _timed(self, pixels: Tensor) -> tuple[Tensor, float]:
        began = time.perf_counter()
        with torch.inference_mode():
            found = self._forward(pixels).float().cpu()
        return found, 1000 * (time.perf_counter() - began)

    def _forward(self, pixels: Tensor) -> Tensor:
        raise NotImplementedError


class Classifying(VitSweep):
    """Top-1 of a classifier."""

    def _forward(self, pixels: Tensor) -> Tensor:
        return self.model(pixels)

    def measure(self, point: Point, batch: Any) -> tuple[list[Answer], float]:
        logits, ms, counts = self.outputs(point, batch.pixels, batch.samples[0].index)
        named = [CLASSES[i] for i in logits.nan_to_num(-torch.inf).argmax(-1).tolist()]
        rows = [
            answer_row(sample, point, name, *count)
            for sample, name, count in zip(batch.samples, named, counts, strict=True)
        ]
        return rows, ms


class Finding(VitSweep):
    """Recall of pictures and captions that belong together, among all samples.

    Whatever strategy is in the image tower, the text tower keeps all words.
    """

    def _prepare(self) -> None:
        super()._prepare()
        self._images: dict[Point, Ran] = {}

    @property
    def batch(self) -> int:
        """All at once: a picture is sought among all."""
        return self.settings.limit

    def _forward(self, pixels: Tensor) -> Tensor:
        return self.model.encode_image(pixels, normalize=True)

    def measure(self, point: Point, batch: Any) -> tuple[list[Answer], float]:
        """Returns the answers; milliseconds are those of the median batch, for all pictures."""
        if point not in self._images:  # once for all tasks
            self._images[point] = self._encoded(point, batch.pixels)
        images, ms, counts = self._images[point]
        likeness = images @ self._texts(batch.samples).T  # [n, n], pictures in rows
        task = batch.samples[0].task
        if task.startswith("image"):
            likeness = likeness.T
        places = ranks(likeness)
        nearest = likeness.nan_to_num(-torch.inf).argmax(1).tolist()
        found = zip(batch.samples, places, nearest, counts, strict=True)
        return [
            answer_row(sample, point, str(best), *count, right=place < SOUGHT[task])
            for sample, place, best, count in found
        ], ms

    def _encoded(self, point: Point, pixels: Tensor) -> Ran:
        size, parts = self.settings.batch_size, []
        for first in range(0, len(pixels), size):
            parts.append(self.outputs(point, pixels[first : first + size], first))
        each = [ms / len(found) for found, ms, _ in parts]
        counts = [count for _, _, some in parts for count in some]
        return torch.cat([p[0] for p in parts]), statistics.median(each) * len(pixels), counts

    def _texts(self, samples: Sequence[Sample]) -> Tensor:
        ids = self.processor.captions([sample.question for sample in samples])
        with torch.inference_mode():
            found = self.model.encode_text(ids.to(self._to["device"]), normalize=True)
        return found.float().cpu()


def ranks(likeness: Tensor) -> list[int]:
    """Per row of ``[n, n]`` how many others are at least as alike as its own; 0 = found first."""
    own = likeness.diagonal()[:, None]
    ahead = (likeness >= own) | likeness.isnan() | own.isnan()
    return (ahead.sum(1) - 1).clamp(min=0).tolist()


SWEEPS: dict[str, type[VitSweep]] = {"mini-vit": Classifying, "mini-clip": Finding}
