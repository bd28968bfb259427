"""DivPrune: keep the subset whose closest two tokens are as far apart as possible.

Max-min diversity on the cosine distance of the projected tokens, found greedily, covers the image
without any attention map, so it works on every tower. arXiv 2503.02175 (vbdi/divprune). The first
pick is the token farthest from its nearest neighbour; kept tokens stay in raster order.
Defaults: none.
"""

from __future__ import annotations

from dataclasses import dataclass

from vtprune.kernels.greedy_select import greedy_select
from vtprune.types import Selection, Signals, Strategy


@dataclass(frozen=True)
class DivPrune(Strategy):
    """Reads nothing but the tokens."""

    def select(self, signals: Signals, k: int) -> Selection:
        picked = greedy_select(signals.tokens, k, mode="max_min")
        return Selection(picked.sort(dim=1).values, signals.n)
