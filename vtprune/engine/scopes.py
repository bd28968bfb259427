"""Which tokens compete for one budget: those of a tile, of an image or video, or of a sample.

Tokens are regrouped into what a strategy decides on together, and its selections are put together
again to one per image. How many stay does not depend on it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vtprune.engine.items import join
from vtprune.engine.signals import Images, Step, decide
from vtprune.engine.timing import timed
from vtprune.errors import UnsupportedError
from vtprune.types import Budget, Mix, Selection
from vtprune.vlm_adapters._base import Grid


@dataclass(frozen=True)
class Unit:
    """Tokens that are decided on together.

    Attributes:
        parts: images, each with the positions ``[n]`` int64 of its tokens that are meant.
        owner: the image, or the sample, that they are of.
        budget: what stays of them.
        grid: ``(t, h, w)`` of the tokens, or None.
    """

    parts: Sequence[tuple[int, Tensor]]
    owner: int
    budget: Budget
    grid: Grid | None

    def __len__(self) -> int:
        return sum(len(where) for _, where in self.parts)

    def of(self, each: Sequence[Tensor]) -> Tensor:
        """Returns the tokens' values ``[n, ...]`` out of those of ``each`` image."""
        taken = [
            each[image] if len(where) == len(each[image]) else each[image][where]
            for image, where in self.parts
        ]
        return taken[0] if len(taken) == 1 else torch.cat(taken)


@timed("score")
def decide_in_scope(step: Step, images: Images, samples: Sequence[int]) -> list[Selection]:
    """Asks the strategy, scope by scope; returns one selection per image (batch dimension 1).

    Args:
        samples: the sample of each image.

    Raises:
        UnsupportedError: a token would be made of tokens of several images.
    """
    units = _units(step, images, samples)
    parts: dict[int, list[tuple[Selection, Tensor]]] = defaultdict(list)
    for unit, chosen in zip(units, decide(step, _regrouped(images, units)), strict=True):
        for own, (image, where) in zip(_apart(step, chosen, unit), unit.parts, strict=True):
            parts[image].append((own, where))
    return [
        join(parts[i], len(x))[0] if len(x) else Selection.all(1, 0, x.device)
        for i, x in enumerate(images.tokens)
    ]


def _units(step: Step, images: Images, samples: Sequence[int]) -> list[Unit]:
    """Returns the units of all images that have tokens left, in order."""
    whole = [
        Unit([(i, torch.arange(len(x), device=x.device))], i, step.budget, images.grids[i])
        for i, x in enumerate(images.tokens)
        if len(x)
    ]
    if step.scope == "tile":
        return [part for unit in whole for part in _tiles(unit, images.tiles[unit.owner])]
    if step.scope == "sample":
        grouped: dict[int, list[Unit]] = defaultdict(list)
        for unit in whole:
            grouped[samples[unit.owner]].append(unit)
        return [_together(sample, units) for sample, units in grouped.items()]
    return whole


def _together(sample: int, units: Sequence[Unit]) -> Unit:
    """Makes one of the images of a sample, in their order, with the sum of their budgets."""
    budget = Budget(tokens=sum(unit.budget.count(len(unit)) for unit in units))
    grid = units[0].grid if len(units) == 1 else None
    return Unit([part for unit in units for part in unit.parts], sample, budget, grid)


def _tiles(unit: Unit, places: Tensor | None) -> list[Unit]:
    """Cuts an image into its tiles, or a video into frames, each with its share of the budget.

    It stays whole where its tokens are of no one tile, and where not every tile would get a token.
    """
    if places is None:
        return [unit]
    found, counts = places[:, 0].unique(return_counts=True)
    if unit.budget.count(len(unit)) < len(found):
        return [unit]
    lengths = counts.tolist()
    spots = places[:, 0].argsort(stable=True).split(lengths)
    ((image, every),) = unit.parts
    return [
        Unit([(image, spot.to(every.device))], unit.owner, budget, _grid(places[spot], unit.grid))
        for spot, budget in zip(spots, unit.budget.split(lengths), strict=True)
    ]


def _grid(places: Tensor, whole: Grid | None) -> Grid | None:
    """Returns the grid of a tile's tokens: a frame's, or of the rectangle that they fill in order.

    Args:
        places: see ``Item``.
        whole: the grid of the image or video.
    """
    if whole is not None:
        return (1, *whole[1:]) if len(places) == whole[1] * whole[2] else None
    first = places[:, 1:].amin(0)
    height, width = (places[:, 1:].amax(0) - first + 1).long().tolist()
    raster = ((places[:, 1:] - first) @ places.new_tensor([width, 1])).long()
    filled = torch.equal(raster, torch.arange(height * width, device=raster.device))
    return (1, height, width) if filled else None


def _regrouped(images: Images, units: Sequence[Unit]) -> Images:
    """Returns the units in the place of images."""
    firsts = [unit.parts[0][0] for unit in units]
    return Images(
        [unit.of(images.tokens) for unit in units],
        [unit.grid for unit in units],
        {need: [unit.of(value) for unit in units] for need, value in images.values.items()},
        None if images.text is None else [images.text[i] for i in firsts],
        [],
        budgets=[unit.budget for unit in units],
        owners=[unit.owner for unit in units],
    )


def _apart(step: Step, chosen: Selection, unit: Unit) -> list[Selection]:
    """Returns what was chosen of each part of a unit, whose tokens lie one part after another."""
    if len(unit.parts) == 1:
        return [chosen]
    slots, rows, first, apart = chosen.slots[0], chosen.rows[0], 0, []
    for _, where in unit.parts:
        n = len(where)
        mine = (slots >= first) & (slots < first + n)
        mix = None if chosen.mix is None else _edges(step, chosen.mix, mine, first, n)
        own = torch.where(rows < 0, -1, rows - first)[mine]
        apart.append(Selection(own[None], n, mix))
        first += n
    return apart


def _edges(step: Step, mix: Mix, mine: Tensor, first: int, n: int) -> Mix:
    """Returns what makes the outputs in ``mine`` ``[K]`` bool, of the n sources from ``first``."""
    of = mine[mix.target[0]]
    source, target = mix.source[0][of] - first, mix.target[0][of]
    if bool(((source < 0) | (source >= n)).any()):
        raise UnsupportedError(
            f"scope='sample': {step.strategy.name} makes a token of tokens of several images, and "
            "none of them is its place. Give scope='image', or a strategy that only drops tokens."
        )
    place = mine.cumsum(0) - 1
    return Mix(source[None], place[target][None], mix.weight[0][of][None])
