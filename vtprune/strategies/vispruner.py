"""VisPruner: part of the budget by [CLS] attention, the rest to tokens that repeat no other.

What attention leaves out is thinned round by round: the tokens most similar to a partner leave
until the budget is met, so that the background keeps a few distinct tokens. arXiv 2412.01818
(Theia-4869/VisPruner; second version of FasterVLM's paper). Similarity is that of the features
before the projector. The official code needs an even number of candidates in every round; here an
odd one leaves no token out. A tower without [CLS] ranks by attention received; where a visual token
is made of several patches, similarity is that of the projected tokens.
Defaults: the official README.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vtprune.errors import ConfigError
from vtprune.kernels.gather_tokens import gather_tokens
from vtprune.kernels.topk_sorted import ranked
from vtprune.scoring.attention import salience, salience_needs
from vtprune.scoring.diversity import least_repeated
from vtprune.types import Facts, Need, Scope, Selection, Signals, Site, Stage, Strategy


@dataclass(frozen=True)
class VisPruner(Strategy):
    """``important``: share of the budget that goes by attention (the authors' 0.75 for 64)."""

    scope: ClassVar[Scope] = "tile"

    important: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.important <= 1:
            raise ConfigError(f"important={self.important!r} must be a share from 0 to 1.")

    def default_layers(self, facts: Facts) -> tuple[int, ...]:
        return (facts.feature_block,)

    def needs(self, facts: Facts) -> tuple[Need, ...]:
        return salience_needs(self.used_layers(facts), facts)

    def plan(self, facts: Facts) -> tuple[Stage, ...]:
        return (Stage(Site.ENCODER if facts.in_tower else Site.PROJECTOR, self.needs(facts)),)

    def select(self, signals: Signals, k: int) -> Selection:
        order = ranked(salience(signals))  # [B, N]
        n_top = int(k * self.important)
        top, rest = order[:, :n_top], order[:, n_top:]
        (features,) = gather_tokens(rest, signals.tokens)
        diverse = rest.gather(1, least_repeated(features, k - n_top))
        return Selection(torch.cat([top, diverse], dim=1).sort(dim=1).values, signals.n)
