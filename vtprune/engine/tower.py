"""Stages between the blocks of a vision tower, or in them: what leaves costs nothing from there on.

Between attention and MLP a stage acts on the output of the first half of a block, and what it
leaves goes through the second.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vtprune.engine.blocks import Blocks, Tile
from vtprune.engine.signals import Images, Step, decide, renews
from vtprune.errors import UnsupportedError
from vtprune.types import Budget, Inside, Selection, TowerNeed
from vtprune.vlm_adapters._base import square


class Climb:
    """The way of all tiles from the first stage to the features.

    Args:
        steps: in order of their blocks, all of one strategy.
        states: ``[tiles, prefix + N, C]`` that enter the block of the first.
        spots: per tile the patches that may be chosen; a tile with none leaves at once.
        budgets: of the other tiles, one per stage; ``images``: which they are a part of.

    Attributes:
        renewed: last block in which new tokens were made, -1 = none. Of it and those before they
            have no quantities.
    """

    def __init__(
        self,
        blocks: Blocks,
        steps: Sequence[Step],
        states: Tensor,
        spots: Sequence[Tensor],
        budgets: Mapping[int, Sequence[Budget]],
        images: Mapping[int, int],
    ) -> None:
        self.blocks, self.spots, self.shape, self.renewed = blocks, spots, states.shape, -1
        self.layers = tuple(blocks.last if s.stage.layer is None else s.stage.layer for s in steps)
        patches = torch.arange(states.shape[1] - blocks.n_prefix, device=states.device)
        read = {
            need: blocks.tap.value(need).unflatten(0, (len(states), -1))
            for need in blocks.needs(0, self.layers[0] - 1)
        }
        self.tiles = {
            b: Tile(
                images[b],
                each,
                states[b],
                patches,
                torch.isin(patches, spots[b]),
                {need: value[b] for need, value in read.items()},
            )
            for b, each in budgets.items()
        }
        self._run(dict(zip(self.layers, steps, strict=True)))
        self._give_back()

    def _run(self, steps: Mapping[int, Step]) -> None:
        tiles, blocks = list(self.tiles.values()), self.blocks
        entered, proportional = tuple(tile.entered for tile in tiles), False
        for number in range(self.layers[0], blocks.last + 1):
            step = steps.get(number)
            within = step is not None and step.stage.before_mlp
            blocks.advance(tiles, number, proportional, skip=blocks.mlp if within else None)
            if step is not None:
                stage = self.layers.index(number)
                inside = Inside(stage, self.layers, len(blocks.modules), entered)
                if _cut(step, tiles, inside, blocks.n_prefix):
                    self.renewed = number
                proportional = step.stage.proportional
            if within:
                blocks.advance(tiles, number, proportional, skip=blocks.attention)

    def _give_back(self) -> None:
        """Leaves to the tap what was read on the way, 0 where a patch had left."""
        tap, width = self.blocks.tap, self.shape[1] - self.blocks.n_prefix
        for need in self.blocks.needs(self.layers[0], self.blocks.last):
            some = next(iter(self.tiles.values())).values[need]
            whole = some.new_zeros(self.shape[0], width, *some.shape[1:])
            for b, tile in self.tiles.items():
                whole[b, tile.alive] = tile.values[need]
            tap.put(need, whole.flatten(0, 1))
        tap.wanted = {
            module: [n for n in needs if not self.layers[0] <= n.layer <= self.blocks.last]
            for module, needs in tap.wanted.items()
        }

    def refuse_orphans(self, needs: Sequence[TowerNeed]) -> None:
        """Raises UnsupportedError where new tokens lack a quantity that is read later."""
        for need in needs:
            if need.layer <= self.renewed:
                raise UnsupportedError(
                    f"{need} is of a block that runs before new tokens are made. Follow the "
                    "strategy that makes them with one that does not read it, or put that first."
                )

    def chosen(self) -> list[Selection]:
        """Returns per tile which of its ``spots`` are left (batch 1)."""
        chosen = []
        for b, spots in enumerate(self.spots):
            left = spots[:0]
            if b in self.tiles:
                left = self.tiles[b].alive[self.tiles[b].used].sort().values
            chosen.append(Selection(torch.searchsorted(spots, left)[None], len(spots)))
        return chosen

    def way(self, tile: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Returns how many tokens of a tile enter attention and MLP of each block."""
        before = (self.shape[1],) * self.layers[0]
        if tile not in self.tiles:
            none = before + (0,) * (len(self.blocks.modules) - len(before))
            return none, none
        on_its_way = self.tiles[tile]
        return before + tuple(on_its_way.attended), before + tuple(on_its_way.passed)

    def features(self) -> Tensor:
        """Returns the output of the last block ``[tiles, prefix + N, C]``, 0 where one had left."""
        p = self.blocks.n_prefix
        whole = next(iter(self.tiles.values())).states.new_zeros(self.shape)
        for b, tile in self.tiles.items():
            whole[b, :p], whole[b, p + tile.alive] = tile.states[:p], tile.states[p:]
        return whole


def _cut(step: Step, tiles: Sequence[Tile], inside: Inside, n_prefix: int) -> bool:
    """Leaves what the strategy chooses, and makes of it; returns whether tokens are new."""
    spots = [tile.used.nonzero()[:, 0] for tile in tiles]
    both = list(zip(tiles, spots, strict=True))
    images = Images(
        [tile.states[n_prefix:][spot] for tile, spot in both],
        [square(len(spot)) if len(spot) == tile.width else None for tile, spot in both],
        {need: [t.values[need][s] for t, s in both] for need in step.stage.tower_needs},
        None,
        [Selection.all(1, len(spot), spot.device) for spot in spots],
        inside,
        budgets=[tile.budgets[inside.stage] for tile in tiles],
        n_prefix=n_prefix,
        owners=[tile.image for tile in tiles],
        sizes=[tile.sizes[spot] for tile, spot in both],
    )
    decided = decide(step, images)
    _refuse_prefix(step, decided)
    for (tile, spot), chosen in zip(both, decided, strict=True):
        if not chosen.is_identity:
            tile.keep(spot, chosen, n_prefix)
    return renews(decided)


def _refuse_prefix(step: Step, decided: Sequence[Selection]) -> None:
    """Raises UnsupportedError where an output is made of prefix tokens."""
    if any(s.n_prefix for s in decided):
        raise UnsupportedError(
            f"{step.strategy.name} makes tokens of [CLS] between the blocks of the tower, which "
            "still need it. Let that stage act on the block that yields the features."
        )
