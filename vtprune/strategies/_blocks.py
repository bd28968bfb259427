"""Base of strategies that act in every block of the tower, a little in each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vtprune.scoring.matching import ascending, averaged, merge_down, n_staying
from vtprune.types import (
    Budget,
    Facts,
    Keys,
    Need,
    Scope,
    Selection,
    Signals,
    Site,
    Stage,
    Strategy,
    TowerNeed,
)


@dataclass(frozen=True)
class InBlocks(Strategy):
    """``layers`` are the blocks that it acts in, by default all up to that of the features.

    It acts between attention and MLP. Every block takes equally many tokens away, so that ``keep``
    is what leaves the last of them; where that is more than half of what is there, earlier ones
    take more. Where a visual token is made of several patches, it acts once, on projected tokens,
    by what it reads of the block that yields the features. A strategy writes ``read`` and
    ``select``; and ``stage`` or ``counts`` where its own are others.
    """

    scope: ClassVar[Scope] = "tile"

    def default_layers(self, facts: Facts) -> tuple[int, ...]:
        return tuple(range(0 if facts.in_tower else facts.feature_block, facts.feature_block + 1))

    def read(self, layer: int, facts: Facts) -> tuple[TowerNeed, ...]:
        """Returns what is read of block ``layer``, for what happens in it."""
        raise NotImplementedError(f"{type(self).__name__} must define read().")

    @property
    def weighs(self) -> bool:
        """Whether later blocks attend to a merged token as to all patches it stands for."""
        return True

    def stage(self, layer: int, facts: Facts) -> Stage:
        """Returns what happens in block ``layer``."""
        return Stage(
            Site.ENCODER,
            self.read(layer, facts),
            layer,
            before_mlp=True,
            proportional=self.weighs,
        )

    def needs(self, facts: Facts) -> tuple[Need, ...]:
        return tuple(n for layer in self.used_layers(facts) for n in self.read(layer, facts))

    def plan(self, facts: Facts) -> tuple[Stage, ...]:
        layers = self.used_layers(facts)
        if not facts.in_tower:
            return (Stage(Site.PROJECTOR, self.read(layers[-1], facts)),)
        return tuple(self.stage(layer, facts) for layer in layers)

    def counts(self, signals: Signals, budget: Budget) -> list[int]:
        inside = signals.inside
        if inside is None:
            return super().counts(signals, budget)
        return [
            n_staying(signals.n, n, budget.count(n), inside.stage, len(inside.layers))
            for n in inside.entered
        ]


def merged_by_keys(signals: Signals, k: int) -> Selection:
    """Merges tokens at even places into those at odd ones that their keys resemble most.

    Between blocks the outputs wait in the order of the halves; elsewhere they are ascending.
    """
    keys = signals.stack(Keys)[-1]  # [B, N, d]
    size = keys.new_ones(keys.shape[:2]).float() if signals.size is None else signals.size
    rows, into = merge_down(keys, size, k, signals.n_prefix)
    if signals.inside is None:
        rows, into = ascending(rows, into)
    return averaged(rows, into, size)
