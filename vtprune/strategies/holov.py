"""HoloV: share the budget among crops of the image, then keep the best by attention in each.

A crop is worth its attention plus the variance of similarities inside it, so context stays
everywhere; the prefill gets shorter. arXiv 2510.02912 (obananas/HoloV). Crops are pieces of the
token sequence: strips of rows, or frames. As in the official code the variances are scaled to the
attention of their own crop, so that they hardly change the shares. Unlike it, what a crop has no
room for goes to the others (the paper's re-allocation), survivors stay in raster order, every image
is served, and fewer tokens than crops are a crop each. The paper's refetching inside the language
model is not in the code, nor here. A tower without [CLS] uses attention received.
Defaults: official code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vtprune.errors import ConfigError
from vtprune.scoring.attention import salience, salience_needs
from vtprune.scoring.crops import crop_order, crop_scores, crop_sizes, fitting_quotas, quotas
from vtprune.scoring.hierarchy import take
from vtprune.types import Facts, Mix, Need, Selection, Signals, Strategy


@dataclass(frozen=True)
class HoloV(Strategy):
    """``crops``: into how many pieces the tokens are cut. ``alpha``: weight of the variances.

    ``compat`` as in the official code: tokens come crop by crop, the most attended to first, and
    zero vectors take the place of what a crop has no room for.
    """

    crops: int = 16
    alpha: float = 0.09
    compat: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.crops, bool) or not isinstance(self.crops, int) or self.crops < 1:
            raise ConfigError(f"crops={self.crops!r} must be a count of at least 1.")
        if not 0 <= self.alpha < float("inf"):
            raise ConfigError(f"alpha={self.alpha!r} must be a weight of at least 0.")

    def default_layers(self, facts: Facts) -> tuple[int, ...]:
        return (facts.feature_block,)

    def needs(self, facts: Facts) -> tuple[Need, ...]:
        return salience_needs(self.used_layers(facts), facts)

    def select(self, signals: Signals, k: int) -> Selection:
        attention, n = salience(signals), signals.n
        sizes = crop_sizes(n, min(self.crops, n), attention.device)
        worth = crop_scores(signals.tokens, attention, len(sizes), self.alpha)  # [B, P]
        if self.compat:
            return _crop_by_crop(attention, quotas(worth, k), sizes, k)
        order, crop, place = crop_order(attention, sizes)
        healthy = attention.isfinite().long()
        room = torch.zeros_like(worth, dtype=torch.int64).scatter_add_(1, crop, healthy)
        beyond = place >= fitting_quotas(worth, k, room).gather(1, crop)
        claim = torch.zeros_like(order).scatter_(1, order, beyond.long())
        return Selection(take(claim, attention, k), n)


def _crop_by_crop(attention: Tensor, quota: Tensor, sizes: Tensor, k: int) -> Selection:
    """The official order: whole crops stay as they are; an edge of weight 0 makes a zero vector."""
    whole = (quota >= sizes).repeat_interleave(sizes, dim=1)
    order, crop, place = crop_order(attention.masked_fill(whole, 0.0), sizes)
    chosen = place < quota.gather(1, crop)
    first = (~chosen).sort(dim=1, stable=True).indices[:, :k]
    rows, real = order.gather(1, first), chosen.gather(1, first)
    target = torch.arange(k, device=rows.device).expand_as(rows)
    mix = Mix(rows, target, real.float())
    return Selection(rows.masked_fill(~real, -1), attention.shape[1], mix)
