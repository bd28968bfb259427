"""PruMerge: keep what [CLS] attends to most and add to each token those that resemble it.

What leaves is also summed up in one new token at the end. arXiv 2403.15388
(42Shawn/LLaVA-PruMerge). As in the official code the attention is that of the block after the
features with its heads joined into one, neighbours are added with their attention as weight and
undivided, outputs come by falling attention, and all of it happens before the projector. The count
is the budget's; that of the paper, the outliers of the attention, comes with ``adaptive``. A tower
without [CLS] takes attention received; where a visual token is made of several patches, projected
tokens are merged. Defaults: official code, but for adaptive.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vtprune.errors import ConfigError
from vtprune.kernels.topk_sorted import ranked
from vtprune.scoring.attention import wide, wide_needs
from vtprune.scoring.merging import absorb, outlier_share
from vtprune.types import Budget, Facts, Need, Scope, Selection, Signals, Site, Stage, Strategy


@dataclass(frozen=True)
class PruMerge(Strategy):
    """``neighbours``: how many tokens are added to each that is kept.

    ``adaptive``: an image keeps as many tokens as it has outliers, and the new one, but at most
    ``keep``. ``compat``: the share of outliers is that of all images of a call, as officially.
    """

    scope: ClassVar[Scope] = "tile"

    neighbours: int = 32
    adaptive: bool = False
    compat: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.neighbours, bool) or self.neighbours < 0:
            raise ConfigError(f"neighbours={self.neighbours!r} must be a count of at least 0.")
        if self.compat and not self.adaptive:
            raise ConfigError("compat=True changes adaptive counts only; set adaptive=True too.")

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
        found = self.found(wide(signals)[0])
        return [min(own + 1, k) for own, k in zip(found, most, strict=True)]

    def select(self, signals: Signals, k: int) -> Selection:
        salience, keys = wide(signals)
        return absorb(self.kept(salience, k - 1), keys, salience, self.neighbours)

    def kept(self, salience: Tensor, k: int) -> Tensor:
        """Returns the tokens that others are added to, ``[B, k]``, in the order of the outputs."""
        return ranked(salience)[:, :k]

    def found(self, salience: Tensor) -> list[int]:
        """Returns how many tokens each row keeps by its outliers; ``salience`` ``[B, N]``."""
        return [max(1, int(salience.shape[1] * share)) for share in self.shares(salience)]

    def shares(self, salience: Tensor) -> list[float]:
        """Returns the share of outliers of each row."""
        if self.compat:
            return outlier_share(salience.flatten()[None]) * len(salience)
        return outlier_share(salience)
