"""ATS: in later blocks sample patches evenly over the sum of their significance, each once.

A patch is as significant as the attention of [CLS] to it times the norm of its value. Patches are
put in order of that and summed up; even points of the sum each take the nearest patch, so where few
patches hold most of it, they are taken by many points, and fewer tokens stay. Those leave between
attention and MLP, which is the same as attending with the sampled queries alone. ECCV 2022,
arXiv 2111.15667 (adaptivetokensampling/ATS). Each image is left as many tokens as it needs;
``keep`` is the most there may be, for which points are as many as the patches that entered, or the
fewer that sample no more. The authors give the points, which a ``grid`` does here: their own is
197, with ``keep=1.0``. In that code, fewer points than patches can take no more than as many of the
highest, which ``compat`` repeats. Without a [CLS] the attention of all queries takes its place.
Where it acts once, after a projector, what is not sampled fills up to ``keep``, highest scores
first. Kept tokens are back in the order of the image. Defaults: official code, but for the points.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vtprune.errors import ConfigError
from vtprune.kernels.topk_sorted import topk_sorted
from vtprune.scoring.sampling import sampled
from vtprune.strategies._blocks import InBlocks
from vtprune.types import (
    Budget,
    ClsRow,
    Facts,
    Received,
    Selection,
    Signals,
    TowerNeed,
    ValueNorm,
)

FLOOR = 8  # tokens that stay at least, if there are


@dataclass(frozen=True)
class ATS(InBlocks):
    """``layers`` are the blocks that sample, by default the last three quarters of all.

    ``grid``: how many tokens, [CLS] among them, an even sample would have, by default those that
    enter the tower. ``compat``: let a smaller grid take no other tokens than the most significant
    ones, as the official code does.
    """

    kind: ClassVar[Literal["adaptive"]] = "adaptive"

    grid: int | None = None
    compat: bool = False

    def __post_init__(self) -> None:
        if self.grid is not None and (isinstance(self.grid, bool) or self.grid < 3):
            raise ConfigError(f"grid={self.grid!r} must be a whole number of at least 3.")

    def default_layers(self, facts: Facts) -> tuple[int, ...]:
        every = super().default_layers(facts)
        return tuple(i for i in every if i >= facts.scale(3, 12)) if facts.in_tower else every

    def read(self, layer: int, facts: Facts) -> tuple[TowerNeed, ...]:
        return (ClsRow(layer) if facts.has_cls else Received(layer)), ValueNorm(layer)

    def significance(self, signals: Signals) -> Tensor:
        """Returns how much of what [CLS] hears a token says, ``[B, N]`` float32, up to a factor."""
        return signals.stack(ClsRow, Received)[-1] * signals.stack(ValueNorm)[-1]

    def counts(self, signals: Signals, budget: Budget) -> list[int]:
        entered = signals.inside.entered if signals.inside else (signals.n,) * len(signals.tokens)
        most = budget.count(entered[0])
        if self.grid is None and (most >= entered[0] or signals.inside is None):
            return [min(most, signals.n)] * len(entered)
        counts = self.sample(signals, most).sum(1)
        return counts.clamp(min=min(FLOOR, most, signals.n)).tolist()

    def sample(self, signals: Signals, most: int) -> Tensor:
        """Returns which tokens are sampled, at most so many: ``[B, N]`` bool."""
        entered = signals.inside.entered[0] if signals.inside else signals.n
        n_points = max(2, entered if self.grid is None else self.grid - 1)
        return sampled(self.significance(signals), most, n_points, self.compat)

    def select(self, signals: Signals, k: int) -> Selection:
        score = self.significance(signals)
        score = score.masked_fill(~score.isfinite(), -torch.inf)
        first = score.masked_fill(self.sample(signals, k), torch.inf)
        return Selection(topk_sorted(first, k), signals.n)
