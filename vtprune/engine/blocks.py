"""The blocks of a vision tower, run one by one or by halves on tiles of any lengths.

Tiles of equal length go together, so that none is padded and none depends on the lengths of others.
A half is the block with its MLP, or its attention, adding nothing: so any block will do that adds
the one and then the other to its input.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from vtprune.engine.tap import Tap
from vtprune.errors import UnsupportedError
from vtprune.types import Budget, Selection, TowerNeed


@dataclass
class Tile:
    """A row of the tower on its way.

    Attributes:
        image: the image that it is a part of.
        budgets: what is left of it after each stage.
        states: ``[prefix + n, C]``.
        alive: ``[n]`` int64, the patches that are still there, in the order of the states.
        used: ``[n]`` bool, those that may be chosen; the others leave with the first that do.
        values: quantities of the blocks so far, ``[n, ...]``.
        sizes: ``[n]`` float32, how many patches each stands for.
        attended, passed: tokens that entered attention and MLP of each block so far.
    """

    image: int
    budgets: Sequence[Budget]
    states: Tensor
    alive: Tensor
    used: Tensor
    values: dict[TowerNeed, Tensor]

    def __post_init__(self) -> None:
        self.entered, self.width = int(self.used.sum()), len(self.used)
        self.sizes = torch.ones(self.width, device=self.states.device)
        self.attended, self.passed = list[int](), list[int]()

    @property
    def untouched(self) -> bool:
        """Whether every patch of the tile is there."""
        return len(self.used) == self.width

    def keep(self, index: Tensor, chosen: Selection, n_prefix: int) -> None:
        """Leaves what ``chosen`` (batch 1) makes of the patches at ``index`` ``[m]``."""
        left = index[chosen.slots[0]]
        prefix, patches = self.states[:n_prefix], self.states[n_prefix:]
        self.states = torch.cat([prefix, chosen.apply(patches[index][None])[0]])
        self.sizes = chosen.counted(self.sizes[index][None])[0]
        self.alive, self.used = self.alive[left], self.used[left]
        self.values = {need: value[left] for need, value in self.values.items()}


@dataclass(frozen=True)
class Blocks:
    """The blocks of a tower up to the one that yields the features.

    Attributes:
        modules: them.
        call: runs one on states ``[B, S, C]``, with what is added to the products of queries and
            keys, ``[B, 1, 1, S]`` or None.
        tap: what reads them.
        n_prefix: tokens before the first patch.
        attention, mlp: what the two parts of a block are called in it.
    """

    modules: Sequence[nn.Module]
    call: Callable[[nn.Module, Tensor, Tensor | None], Tensor]
    tap: Tap
    n_prefix: int
    attention: str = "self_attn"
    mlp: str = "mlp"

    @property
    def last(self) -> int:
        return len(self.modules) - 1

    def needs(self, first: int, last: int) -> list[TowerNeed]:
        """Returns what the tap is to read in the blocks from ``first`` to ``last``."""
        wanted = [need for needs in self.tap.wanted.values() for need in needs]
        return [need for need in wanted if first <= need.layer <= last]

    def advance(
        self, tiles: Sequence[Tile], number: int, proportional: bool, skip: str | None = None
    ) -> None:
        """Runs block ``number`` on tiles of any lengths, those of equal length together.

        Args:
            proportional: whether a merged token gets attention for all patches it stands for.
            skip: name of a part of the block that is not to run.
        """
        block, read = self.modules[number], self.needs(number, number)
        with self._without(block, skip):
            for group in _alike(tiles):
                weighed = proportional and not group[0].untouched
                mask = _log_sizes(group, self.n_prefix) if weighed else None
                states = self.call(block, torch.stack([tile.states for tile in group]), mask)
                for tile, row in zip(group, states, strict=True):
                    tile.states = row
                    tile.attended += [len(row)] if skip != self.attention else []
                    tile.passed += [len(row)] if skip != self.mlp else []
                for need in read if skip != self.attention else ():
                    value = self.tap.take(need).unflatten(0, (len(group), -1))
                    for tile, row in zip(group, value, strict=True):
                        tile.values[need] = row

    @contextmanager
    def _without(self, block: nn.Module, part: str | None) -> Iterator[None]:
        """Lets the part of ``block`` of that name add nothing inside."""
        if part is None:
            yield
            return
        was = getattr(block, part, None)
        if was is None:
            raise UnsupportedError(
                f"{type(block).__name__} has no {part!r}, so nothing can act between its attention "
                "and its MLP. Use a strategy that acts after a block, or after the tower."
            )
        setattr(block, part, _Nothing(weights=part == self.attention))
        try:
            yield
        finally:
            setattr(block, part, was)


class _Nothing(nn.Module):
    """Takes the place of the MLP, or of attention, which gives ``weights`` too."""

    def __init__(self, weights: bool) -> None:
        super().__init__()
        self.weights = weights

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        zeros = torch.zeros_like(hidden_states)
        return (zeros, None) if self.weights else zeros


def _alike(tiles: Sequence[Tile]) -> list[list[Tile]]:
    """Groups tiles by their length."""
    groups: dict[int, list[Tile]] = defaultdict(list)
    for tile in tiles:
        groups[len(tile.states)].append(tile)
    return list(groups.values())


def _log_sizes(tiles: Sequence[Tile], n_prefix: int) -> Tensor:
    """Returns what the keys of tiles of equal length get added, ``[B, 1, 1, S]``."""
    sizes = torch.stack([tile.sizes for tile in tiles])
    return pad(sizes.log(), (n_prefix, 0)).to(tiles[0].states.dtype)[:, None, None]
