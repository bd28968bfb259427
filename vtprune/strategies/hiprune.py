"""HiPrune: keep a middle block's best tokens with their neighbours, then the deep block's best.

The middle block finds objects: its anchors stay with what is around them; the block that yields the
features adds registers, which sum up the image. The score is attention received, so no tower needs
[CLS]. The prefill gets shorter. arXiv 2508.00553 (Danielement321/HiPrune). Unlike the official
code, rows of the grid do not run into each other, no token is chosen twice, and a budget too small
for all neighbours keeps those of the best anchors. Tokens without a grid (an image whose tokens are
made of several tiles; what an earlier strategy left) have no neighbours: registers stay instead.
HiPrune++ has no public code; here it reads the language model's embeddings, not those of a text
tower. Defaults: official code; beta from the paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtprune.errors import ConfigError, InputError
from vtprune.scoring.hierarchy import claims, take
from vtprune.scoring.text import relevance
from vtprune.types import (
    Budget,
    Facts,
    InstructionText,
    Need,
    Received,
    Scope,
    Selection,
    Signals,
    Strategy,
)


@dataclass(frozen=True)
class HiPrune(Strategy):
    """``alpha``: share of the budget for anchors and their four neighbours, 0 to 1.

    ``plus``: the share ``beta`` of the budget goes to the tokens most like the mean of the
    instruction's embeddings. ``compat``: neighbours by flat index as in the official code, and
    ``beta`` on top of the budget. ``layers`` are the middle block and the deep one.
    """

    scope: ClassVar[Scope] = "tile"

    alpha: float = 0.1
    plus: bool = False
    beta: float = 0.1
    compat: bool = False

    def __post_init__(self) -> None:
        for name in ("alpha", "beta"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}={getattr(self, name)!r} must be a share from 0 to 1.")
        if self.layers is not None and len(self.layers) > 2:
            raise ConfigError(f"layers={self.layers}: give the middle block and the deep one.")

    def default_layers(self, facts: Facts) -> tuple[int, ...]:
        deep = facts.readable(facts.feature_block)
        middle = facts.scale(8, 24) if facts.full_blocks is None else facts.scale(15, 32)
        return max(0, min(middle, deep - 1)), deep

    def needs(self, facts: Facts) -> tuple[Need, ...]:
        text = (InstructionText(),) if self.plus else ()
        return (*(Received(layer) for layer in self.used_layers(facts)), *text)

    def counts(self, signals: Signals, budget: Budget) -> list[int]:
        k = budget.count(signals.n)
        if self.plus and self.compat:
            k = min(k + round(k * self.beta), signals.n)
        return [k] * len(signals.tokens)

    def select(self, signals: Signals, k: int) -> Selection:
        received = signals.stack(Received)  # [1 or 2, B, N]
        n_visual = self._n_visual(k)
        n_anchors = round(n_visual * self.alpha / 5)
        claim = claims(received[0], n_anchors, signals.grid, wrap=self.compat)  # [B, N]
        rows = take(claim, received[-1], n_visual)
        if n_visual < k:
            others = torch.ones_like(claim).scatter_(1, rows, 0)
            rows = take(others, relevance(signals.tokens, _averaged(signals.text)), k)
        return Selection(rows, signals.n)

    def _n_visual(self, k: int) -> int:
        """Those of ``k`` that the instruction does not choose: it has a share, or comes on top."""
        if not self.plus:
            return k
        if not self.compat:
            return k - round(k * self.beta)
        return next(v for v in range(k, -1, -1) if v + round(v * self.beta) <= k)


def _averaged(text: Sequence[Tensor] | None) -> list[Tensor]:
    """Returns per row one vector ``[1, D]`` along the mean of its words."""
    if text is None:
        raise InputError("HiPrune++ reads the instruction; give signals.text, per row [M, D].")
    return [words.float().sum(0, keepdim=True) for words in text]
