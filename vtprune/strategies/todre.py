"""ToDRE: keep a diverse subset, grown from the token that [CLS] attends to most.

Each pick has the lowest sum of cosine similarities to the picks before it, so the subset covers
the image; the prefill gets shorter, the vision tower runs in full. arXiv 2505.18757 (no public
code; this is its stage 1 as in the second version). The pivot comes from the last block of the
tower, without [CLS] from attention received (the paper takes any token there). The paper leaves the
order open: kept tokens stay in raster order and newlines are no candidates.
Defaults: the paper (second version).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from vtprune.errors import ConfigError
from vtprune.kernels.greedy_select import greedy_select
from vtprune.kernels.topk_sorted import topk_sorted
from vtprune.scoring.attention import salience, salience_needs
from vtprune.scoring.diversity import centers_from
from vtprune.types import Facts, Need, Selection, Signals, Strategy

Objective = Literal["max_sum", "max_min"]


@dataclass(frozen=True)
class ToDRE(Strategy):
    """``objective``: ``max_sum``, or ``max_min`` for the k-center of the paper's first version.

    ``thumbnail``: the pivot is among that many tokens from the first on, such as the base view of
    a tiled image; by default among all.
    """

    objective: Objective = "max_sum"
    thumbnail: int | None = None

    def __post_init__(self) -> None:
        if self.objective not in get_args(Objective):
            known = " or ".join(get_args(Objective))
            raise ConfigError(f"objective={self.objective!r} is unknown; choose {known}.")
        if self.thumbnail is not None and (isinstance(self.thumbnail, bool) or self.thumbnail < 1):
            raise ConfigError(f"thumbnail={self.thumbnail!r} must be a count of at least 1.")

    def default_layers(self, facts: Facts) -> tuple[int, ...]:
        return (facts.vision_layers - 1,)

    def needs(self, facts: Facts) -> tuple[Need, ...]:
        return salience_needs(self.used_layers(facts), facts)

    def select(self, signals: Signals, k: int) -> Selection:
        return Selection(self.picks(signals, k).sort(dim=1).values, signals.n)

    def picks(self, signals: Signals, k: int) -> Tensor:
        """Returns the tokens in the order in which they are picked, ``[B, k]``, the pivot first."""
        pivot = topk_sorted(salience(signals)[:, : self.thumbnail], 1)[:, 0]
        if self.objective == "max_min":
            return centers_from(pivot, signals.tokens, k)
        return greedy_select(signals.tokens, k, mode="max_sum", pivot=pivot)
