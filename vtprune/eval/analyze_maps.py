"""Which places of an image survive: how often over samples, and drawn on the picture of some."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vtprune.engine.inputs import given
from vtprune.engine.onlooker import Seen
from vtprune.engine.wrap import Handle
from vtprune.errors import UnsupportedError
from vtprune.eval.analyze_sinks import Grid
from vtprune.eval.budgets import CEILING, Point
from vtprune.eval.regions import regions_of
from vtprune.eval.report_overlays import Card, Drawn, Gallery, Overlay, data_uri, outline, shade
from vtprune.eval.report_seen import Picture
from vtprune.eval.rows import Answer
from vtprune.eval.samples import Sample
from vtprune.eval.show import what_is_seen
from vtprune.vlm_adapters._base import VLMAdapter


@dataclass(frozen=True)
class Map:
    """Of the ``n`` samples with this grid of frames, rows and columns, who survives.

    ``share`` has the frames' rows one below the other: of how many samples, 0 to 1, the token of a
    place leaves the last layer. Where tokens merge that is the one whose place they took.
    """

    grid: Grid
    n: int
    share: list[list[float]]


def grids_of(adapter: VLMAdapter, inputs: Mapping[str, Any], visual: Tensor) -> list[Grid | None]:
    """Returns the grid that the visual tokens of each prompt form, None where they form none.

    Args:
        visual: ``[B, L]`` bool.
    """
    counts, kinds = visual.sum(1).tolist(), given(adapter, inputs)
    if len(kinds) != 1 or kinds[0].item not in ("image", "video"):  # tiles have grids of their own
        return [None] * len(counts)
    found = adapter.grids(kinds[0], counts, inputs)
    if len(found) != len(counts):
        return [None] * len(counts)
    fits = zip(found, counts, strict=True)
    return [g if g is not None and math.prod(g) == n else None for g, n in fits]


def survivors(handle: Handle, seen: Seen) -> Tensor:
    """Returns which visual tokens leave the last layer, ``[B, L]`` bool on the CPU."""
    final = handle.final
    assert final is not None  # there was a call
    left = torch.zeros(len(final), seen.visual.shape[1] + 1, dtype=torch.bool)
    columns = final.cpu()
    left.scatter_(1, columns.masked_fill(columns < 0, left.shape[1] - 1), True)
    return left[:, :-1] & seen.visual


class Maps:
    """Adds up survivors over samples, by grid."""

    def __init__(self) -> None:
        self._sums: dict[Grid, tuple[int, Tensor]] = {}

    def add(self, left: Tensor, visual: Tensor, grids: Sequence[Grid | None]) -> None:
        """Takes a batch: of the ``visual`` tokens ``[B, L]`` those that are ``left``."""
        for b, grid in enumerate(grids):
            if grid is not None:
                n, total = self._sums.get(grid, (0, torch.zeros(math.prod(grid))))
                self._sums[grid] = n + 1, total + left[b, visual[b]]

    def maps(self) -> list[Map]:
        """Returns a map per grid, that of most samples first."""
        order = sorted(self._sums.items(), key=lambda item: -item[1][0])
        return [Map(grid, n, (x / n).view(-1, grid[2]).tolist()) for grid, (n, x) in order]


class Album:
    """The first samples, and what each point kept of them.

    Args:
        size: how many samples are drawn.
        image_processor: the model's.
    """

    def __init__(self, size: int, image_processor: Any) -> None:
        self.size, self.image_processor = size, image_processor
        self.note = ""
        self._pictures: dict[int, Picture] = {}
        self._rows: dict[int, dict[Point, Answer]] = {}
        self._overlays: dict[tuple[int, Point], Overlay] = {}

    def begin(self, samples: Sequence[Sample], pixels: Tensor | None) -> None:
        """Takes the pictures of a batch as the tower gets them: ``pixels`` is what it gets."""
        for b, sample in enumerate(samples):
            if len(self._pictures) == self.size or self.note or pixels is None:
                return
            own = pixels[b : b + 1] if pixels.ndim == 4 else pixels
            try:
                seen = what_is_seen(own, self.image_processor, sample.image)
            except UnsupportedError:
                self.note = "The visual tokens of this model form no single picture to draw on."
                return
            self._pictures[sample.index] = seen
            self._rows[sample.index] = {}

    def add(self, row: Answer, handle: Handle | None, b: int, left: Tensor, grid: Any) -> None:
        """Takes what a point kept of a sample.

        Args:
            b: the sample's row in the batch; left: ``[n]`` bool, which visual tokens survive.
            grid: of these; None = they form none.
        """
        seen = self._pictures.get(row.sample)
        if seen is None:
            return
        self._rows[row.sample][row.point] = row
        if handle is None or grid is None or grid[0] != 1:
            return
        regions = regions_of(handle.selections[b], left.reshape(grid[1:]).numpy())
        overlay = Overlay(row, shade(seen, regions), outline(seen, regions))
        self._overlays[row.sample, row.point] = overlay

    def gallery(self) -> Gallery:
        """Returns the pictures with a card per strategy, that which keeps most first."""
        points = list(dict.fromkeys(point for _, point in self._overlays))
        if not points:
            return Gallery(note=self.note)
        kept: dict[str, list[float]] = {}
        for overlay in self._overlays.values():
            kept.setdefault(overlay.answer.budget, []).append(overlay.answer.kept)
        budgets = sorted(kept, key=lambda name: -float(np.mean(kept[name])))
        strategies = list(dict.fromkeys(point.strategy for point in points))
        drawn = []
        for number, seen in self._pictures.items():
            rows, (height, width) = self._rows[number], seen.shape[:2]
            cards = [
                Card(s, [self._overlays.get((number, Point(s, name))) for name in budgets])
                for s in strategies
            ]
            picture = data_uri((seen * 255).round().astype(np.uint8))
            first = next(iter(rows.values()))
            drawn.append(Drawn(first, rows.get(CEILING), picture, width, height, cards))
        return Gallery(budgets, drawn, self.note)
