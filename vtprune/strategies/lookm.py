"""LOOK-M: after the prefill each head caches text first, then visual tokens by all attention.

All tokens take part while the prompt is read; then in each layer every key/value head keeps the
visual tokens that received most attention from the whole prompt, and the most recent ones, so
decoding reads and stores less while the prefill costs a little more. What leaves is merged into
what stays and has the most similar key. arXiv 2406.18139 (SUSTechBruce/LOOK-M). It is query-aware:
the question is among those that attend. What differs from the official code: ``keep`` counts visual
tokens; heads that share keys decide together, by their mean; values alone are merged, into visual
tokens alone. With ``compat`` counts and merging are the authors'. Defaults: official code, but for
the merging.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vtprune.errors import ConfigError
from vtprune.evicting import Entries, Kept
from vtprune.scoring.evicting import Merge, check_merge, column_sums, keep_visual
from vtprune.strategies._cache import Cached
from vtprune.types import Budget, Facts


@dataclass(frozen=True)
class LookM(Cached):
    """``recent``: the share of the prompt, its last tokens, whose visual ones stay first.

    ``merge``: what of tokens that leave is merged into those that stay: ``pivot``, ``average`` or
    ``weighted`` keys and values, into text too, as in the paper; the ``values`` alone, into visual
    tokens; or ``none``. None = ``values``, or ``pivot`` with ``compat``.

    With ``compat`` the share ``keep`` is of all tokens of the prompt, and 0.2 the authors': without
    the ``recent`` ones it is what is left for text that is not recent, all of which stays, and only
    then for visual tokens, of which none may stay.
    """

    recent: float = 0.1
    merge: Merge | None = None
    compat: bool = False

    def __post_init__(self) -> None:
        if self.merge is not None:
            check_merge(self.merge)
        if not 0 <= self.recent < 1:
            raise ConfigError(f"recent={self.recent!r} is no share; give one from 0 and below 1.")

    @property
    def merging(self) -> Merge:
        return self.merge or ("pivot" if self.compat else "values")

    def check_budget(self, budget: Budget, facts: Facts) -> None:
        if self.compat and budget.fraction is not None and budget.fraction < self.recent:
            raise ConfigError(
                f"keep={budget.fraction} is less than recent={self.recent}, which is part of it "
                "with compat=True. Keep more, or lower recent."
            )

    def evict(self, entries: Entries, budget: Budget) -> Kept | None:
        spots = entries.visual.nonzero()[:, 0]
        latest = spots >= entries.n - int(self.recent * entries.n)
        k = self._count(entries, budget, int(latest.sum()))
        if k >= len(spots):
            return None
        scores = column_sums(entries)[:, spots]
        first = torch.where(latest, torch.inf, scores)
        if k < int(latest.sum()):  # then the most recent of them
            first = torch.where(latest, spots.float(), -torch.inf).expand_as(scores)
        return keep_visual(entries, first, k, self.merging)

    def _count(self, entries: Entries, budget: Budget, latest: int) -> int:
        """Returns how many visual tokens stay per head, of which so many are recent."""
        n_visual = int(entries.visual.sum())
        if not self.compat:
            return budget.count(n_visual)
        recent = int(self.recent * entries.n)
        hitters = int((budget.share(entries.n) - self.recent) * entries.n)
        old_text = int((~entries.visual[: entries.n - recent]).sum())
        return min(n_visual, latest + max(0, hitters - old_text))
