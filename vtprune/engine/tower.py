"""Stages between the blocks of a vision tower: what leaves is not computed by the blocks after it.

From the first stage on, the blocks are called here, on the tiles of equal length together, so that
no tile is padded and none depends on the lengths of others.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vtprune.engine.signals import Images, Step, decide
from vtprune.engine.tap import Tap
from vtprune.errors import UnsupportedError
from vtprune.types import Budget, Inside, Selection, TowerNeed
from vtprune.vlm_adapters._base import square


@dataclass
class Tile:
    """A row of the tower on its way.

    Attributes:
        image: the image that it is a part of.
        budget: what is left of it in the end.
        states: ``[prefix + n, C]``.
        alive: ``[n]`` int64, the patches that are still there.
        used: ``[n]`` bool, those that may be chosen; the others leave with the first that do.
        values: quantities of the blocks so far, ``[n, ...]``.
    """

    image: int
    budget: Budget
    states: Tensor
    alive: Tensor
    used: Tensor
    values: dict[TowerNeed, Tensor]

    def __post_init__(self) -> None:
        self.entered, self.size = int(self.used.sum()), len(self.used)

    @property
    def whole(self) -> bool:
        """Whether every patch of the tile is there and may be chosen."""
        return len(self.used) == self.size and bool(self.used.all())

    def keep(self, index: Tensor, n_prefix: int) -> None:
        """Drops all patches but those at ``index`` ``[k]``."""
        self.states = torch.cat([self.states[:n_prefix], self.states[n_prefix:][index]])
        self.alive, self.used = self.alive[index], self.used[index]
        self.values = {need: value[index] for need, value in self.values.items()}


@dataclass(frozen=True)
class Blocks:
    """The blocks of a tower up to the one that yields the features.

    Attributes:
        modules: them.
        call: runs one on states ``[B, S, C]``.
        tap: what reads them.
        n_prefix: tokens before the first patch.
    """

    modules: Sequence[nn.Module]
    call: Callable[[nn.Module, Tensor], Tensor]
    tap: Tap
    n_prefix: int

    @property
    def last(self) -> int:
        return len(self.modules) - 1

    def needs(self, first: int, last: int) -> list[TowerNeed]:
        """Returns what the tap is to read in the blocks from ``first`` to ``last``."""
        wanted = [need for needs in self.tap.wanted.values() for need in needs]
        return [need for need in wanted if first <= need.layer <= last]

    def advance(self, tiles: Sequence[Tile], number: int) -> None:
        """Runs block ``number`` on tiles of any lengths, those of equal length together."""
        groups: dict[int, list[Tile]] = defaultdict(list)
        for tile in tiles:
            groups[len(tile.states)].append(tile)
        for group in groups.values():
            states = self.call(self.modules[number], torch.stack([t.states for t in group]))
            for tile, row in zip(group, states, strict=True):
                tile.states = row
            for need in self.needs(number, number):
                value = self.tap.take(need).unflatten(0, (len(group), -1))
                for tile, row in zip(group, value, strict=True):
                    tile.values[need] = row


class Climb:
    """The way of all tiles from the first stage to the features.

    Args:
        steps: in order of their blocks, all of one strategy.
        output: ``[tiles, prefix + N, C]`` of the block after which the first acts.
        spots: per tile the patches that may be chosen; a tile with none leaves at once.
        budgets: of the other tiles; ``images``: which they are a part of.
    """

    def __init__(
        self,
        blocks: Blocks,
        steps: Sequence[Step],
        output: Tensor,
        spots: Sequence[Tensor],
        budgets: Mapping[int, Budget],
        images: Mapping[int, int],
    ) -> None:
        self.blocks, self.spots, self.shape = blocks, spots, output.shape
        self.layers = tuple(blocks.last if s.stage.layer is None else s.stage.layer for s in steps)
        patches = torch.arange(output.shape[1] - blocks.n_prefix, device=output.device)
        read = {
            need: blocks.tap.value(need).unflatten(0, (len(output), -1))
            for need in blocks.needs(0, self.layers[0])
        }
        self.tiles = {
            b: Tile(
                images[b],
                budget,
                output[b],
                patches,
                torch.isin(patches, spots[b]),
                {need: value[b] for need, value in read.items()},
            )
            for b, budget in budgets.items()
        }
        self._run(dict(zip(self.layers, steps, strict=True)))
        self._give_back()

    def _run(self, steps: Mapping[int, Step]) -> None:
        tiles = list(self.tiles.values())
        for number in range(self.layers[0], self.blocks.last + 1):
            if number > self.layers[0]:
                self.blocks.advance(tiles, number)
            if number in steps:
                entered = tuple(tile.entered for tile in tiles)
                stage = self.layers.index(number)
                inside = Inside(stage, self.layers, len(self.blocks.modules), entered)
                _cut(steps[number], tiles, inside, self.blocks.n_prefix)

    def _give_back(self) -> None:
        """Leaves to the tap what was read on the way, 0 where a patch had left."""
        tap, width = self.blocks.tap, self.shape[1] - self.blocks.n_prefix
        for need in self.blocks.needs(self.layers[0] + 1, self.blocks.last):
            some = next(iter(self.tiles.values())).values[need]
            whole = some.new_zeros(self.shape[0], width, *some.shape[1:])
            for b, tile in self.tiles.items():
                whole[b, tile.alive] = tile.values[need]
            tap.put(need, whole.flatten(0, 1))
        tap.wanted = {
            module: [n for n in needs if not self.layers[0] < n.layer <= self.blocks.last]
            for module, needs in tap.wanted.items()
        }

    def chosen(self) -> list[Selection]:
        """Returns per tile which of its ``spots`` are left (batch 1)."""
        none = torch.zeros(1, 0, dtype=torch.long, device=self.spots[0].device)
        return [
            Selection(
                torch.searchsorted(spots, self.tiles[b].alive[self.tiles[b].used])[None], len(spots)
            )
            if b in self.tiles
            else Selection(none, 0)
            for b, spots in enumerate(self.spots)
        ]

    def features(self) -> Tensor:
        """Returns the output of the last block ``[tiles, prefix + N, C]``, 0 where one had left."""
        p = self.blocks.n_prefix
        whole = next(iter(self.tiles.values())).states.new_zeros(self.shape)
        for b, tile in self.tiles.items():
            whole[b, :p], whole[b, p + tile.alive] = tile.states[:p], tile.states[p:]
        return whole


def _cut(step: Step, tiles: Sequence[Tile], inside: Inside, n_prefix: int) -> None:
    """Lets the tokens leave that the strategy does not choose."""
    spots = [tile.used.nonzero()[:, 0] for tile in tiles]
    both = list(zip(tiles, spots, strict=True))
    images = Images(
        [tile.states[n_prefix:][spot] for tile, spot in both],
        [square(len(spot)) if tile.whole else None for tile, spot in both],
        {need: [t.values[need][s] for t, s in both] for need in step.stage.tower_needs},
        None,
        [Selection.all(1, len(spot), spot.device) for spot in spots],
        inside,
        budgets=[tile.budget for tile in tiles],
        owners=[tile.image for tile in tiles],
    )
    for (tile, spot), chosen in zip(both, decide(step, images), strict=True):
        if chosen.mix is not None:
            raise UnsupportedError(
                f"{step.strategy.name} makes new tokens between blocks of the tower, where tokens "
                "can only leave. Let that stage act on the block that yields the features."
            )
        if not chosen.is_identity:
            tile.keep(spot[chosen.rows[0].sort().values], n_prefix)
