"""Contiguous crops of a sequence of tokens: what each is worth, and its share of a budget."""

from __future__ import annotations

import torch
from torch import Tensor

from vtprune.kernels._common import full_precision
from vtprune.kernels.topk_sorted import ranked

EPS = 1e-6


def crop_sizes(n: int, crops: int, device: torch.device) -> Tensor:
    """Returns ``[crops]`` int64 summing to ``n``: as equal as can be, the longer ones first."""
    return n // crops + (torch.arange(crops, device=device) < n % crops).long()


@torch.no_grad()
def crop_scores(tokens: Tensor, attention: Tensor, crops: int, alpha: float) -> Tensor:
    """Returns the mean of attention and similarity variance in each crop, ``[B, crops]`` float32.

    Attention is scaled by 1000, and a crop's variances by ``alpha`` and to the mean of its
    attention. A crop of one token is worth its bare attention. NaN and inf count as nothing.

    Args:
        tokens: ``[B, N, D]``; attention: ``[B, N]``; crops: from 1 to N.
    """
    n = tokens.shape[1]
    size = n // crops
    cut = n % crops * (size + 1)
    attention = _finite(attention)
    parts = []
    with full_precision(tokens):
        for part, m in ((slice(cut), size + 1), (slice(cut, n), size)):
            x, a = tokens[:, part].unflatten(1, (-1, m)), attention[:, part].unflatten(1, (-1, m))
            parts.append(a[..., 0] if m == 1 else _worth(x, 1000 * a, alpha))
    return torch.cat(parts, dim=1).clamp(min=0)


def _worth(tokens: Tensor, attention: Tensor, alpha: float) -> Tensor:
    """Returns ``[B, C]`` of crops ``[B, C, m, D]`` and ``[B, C, m]``, m > 1."""
    x = _finite(tokens)
    x = x / (x.norm(dim=-1, keepdim=True) + EPS)
    cosine = x @ x.mT
    cosine.diagonal(dim1=-2, dim2=-1).zero_()
    others = x.shape[-2] - 1
    mean = cosine.sum(-1, keepdim=True) / others
    variance = (cosine - mean).square().sum(-1) / others  # [B, C, m], the zero diagonal included
    scale = attention.abs().mean(-1) / (variance.mean(-1) + EPS)
    return (attention + alpha * variance * scale[..., None]).mean(-1)


def _finite(x: Tensor) -> Tensor:
    return x.float().nan_to_num(0.0, 0.0, 0.0)


def quotas(worth: Tensor, k: int | Tensor) -> Tensor:
    """Shares ``k`` by worth: whole parts, then one more each for the crops worth most.

    Args:
        worth: ``[B, P]`` of at least 0; k: one number, or ``[B, 1]``.

    Returns:
        ``[B, P]`` int64, which may exceed what a crop has; sums to ``k`` up to rounding.
    """
    quota = (worth / (worth.sum(1, keepdim=True) + EPS) * k).floor().long()
    turn = ranked(worth).argsort(dim=1)
    return quota + (turn < k - quota.sum(1, keepdim=True))


def fitting_quotas(worth: Tensor, k: int, room: Tensor) -> Tensor:
    """``quotas`` within ``room`` ``[B, P]``: what does not fit goes to the others, again by worth.

    Returns:
        ``[B, P]`` int64 that sums to ``k``, or to all the room there is.
    """
    given = torch.zeros_like(room)
    while True:
        free = room - given
        left = torch.minimum(k - given.sum(1, keepdim=True), free.sum(1, keepdim=True))
        if not bool((left > 0).any()):
            return given
        open_worth = worth.masked_fill(free == 0, 0.0)
        nothing = open_worth.sum(1, keepdim=True) == 0
        open_worth = torch.where(nothing, (free > 0).to(worth), open_worth)
        given = given + torch.minimum(quotas(open_worth, left), free)


def crop_order(attention: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sorts each crop by falling attention, ties to the lower index, and leaves it in its place.

    Args:
        attention: ``[B, N]``; sizes: ``[P]`` int64 that sum to N.

    Returns:
        ``[B, N]`` int64 each: the tokens, crop after crop; the crop of each; its place there.
    """
    n = attention.shape[1]
    crop = torch.arange(len(sizes), device=sizes.device).repeat_interleave(sizes)
    order = ranked(attention)
    order = order.gather(1, crop[order].sort(dim=1, stable=True).indices)
    place = torch.arange(n, device=crop.device) - (sizes.cumsum(0) - sizes)[crop]
    return order, crop.expand_as(order), place.expand_as(order)
