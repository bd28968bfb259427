"""PruMerge+: PruMerge with patches at even distances beside those that [CLS] attends to.

About three on a grid for each salient one bring back what attention overlooks. arXiv 2403.15388
(42Shawn/LLaVA-PruMerge). Signals and merging are those of ``prumerge``; the patches of the grid
come after the salient ones, in raster order. With a budget a quarter of it goes by attention and
the grid spans the patches that are left. The stride of the official code, whose grid never reaches
the last patch, comes with ``adaptive``; where it rounds to 0, which ends that code, it is 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vtprune.errors import ConfigError
from vtprune.scoring.attention import wide, wide_needs
from vtprune.scoring.diversity import outside
from vtprune.scoring.merging import absorb, falling, gridded, outlier_share
from vtprune.types import Budget, Facts, Need, Selection, Signals, Site, Stage, Strategy


@dataclass(frozen=True)
class PruMergePlus(Strategy):
    """``neighbours``: how many tokens are added to each that is kept.

    ``adaptive``: the outliers of an image's attention give its salient patches and its stride, and
    so its count, which is at most ``keep``.
    """

    neighbours: int = 32
    adaptive: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.neighbours, bool) or self.neighbours < 0:
            raise ConfigError(f"neighbours={self.neighbours!r} must be a count of at least 0.")

    def default_layers(self, facts: Facts) -> tuple[int, ...]:
        return (min(facts.feature_block + 1, facts.vision_layers - 1),)

    def needs(self, facts: Facts) -> tuple[Need, ...]:
        return wide_needs(self.used_layers(facts)[-1], facts)

    def plan(self, facts: Facts) -> tuple[Stage, ...]:
        return (Stage(Site.ENCODER if facts.in_tower else Site.PROJECTOR, self.needs(facts)),)

    def counts(self, signals: Signals, budget: Budget) -> list[int]:
        most = super().counts(signals, budget)
        if not self.adaptive:
            return most
        _, found = self._official(signals)
        return [min(own + 1, k) for own, k in zip(found, most, strict=True)]

    def select(self, signals: Signals, k: int) -> Selection:
        salience, keys = wide(signals)
        n_top = (k + 2) // 4
        n_grid = k - 1 - n_top
        top = falling(salience)[:, :n_top]
        rest = outside(top, signals.n)
        spaced = torch.arange(n_grid, device=rest.device) * rest.shape[1] // max(1, n_grid)
        kept = torch.cat([top, rest[:, spaced]], dim=1)
        if self.adaptive:
            order, found = self._official(signals)
            own = torch.tensor(found, device=rest.device) == k - 1  # others are cut by the budget
            kept = torch.where(own[:, None], order[:, : k - 1], kept)
        return absorb(kept, keys, salience, self.neighbours)

    def _official(self, signals: Signals) -> tuple[torch.Tensor, list[int]]:
        """Returns the order in which patches are kept ``[B, N]``, and how many of each row are."""
        salience, _ = wide(signals)
        shares = [max(share, 1 / signals.n) for share in outlier_share(salience)]
        tops = [max(1, int(signals.n * share)) for share in shares]
        return gridded(salience, tops, [max(1, int(int(1 / share) / 3)) for share in shares])
