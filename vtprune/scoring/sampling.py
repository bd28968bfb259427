"""Tokens that are sampled by their scores, evenly over the sum of them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

GRIDS = 32  # at most so many are tried
TIE = 5e-7  # what the rounding of sums may tell apart


def cumulated(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the tokens by rising score, and up to each the sum of scores, from 0 to 1.

    Args:
        scores: ``[B, N]``, at least 0; NaN and inf count as 0. Ties stay in their order. Where all
            are 0 they count as equal.

    Returns:
        ``[B, N]`` int64, and ``[B, N]`` float32; of one token 1.
    """
    scores = scores.float().nan_to_num(0.0, 0.0, 0.0)
    scores = torch.where(scores.sum(1, keepdim=True) > 0, scores, 1.0)
    scores, order = scores.sort(dim=1, stable=True)
    sums = (scores / scores.sum(1, keepdim=True)).cumsum(1)
    low, high = sums[:, :1], sums[:, -1:]
    return order, torch.where(high > low, (sums - low) / (high - low), 1.0)


def nearest(sums: Tensor, n_points: int, crop: bool = False) -> Tensor:
    """Returns which of ascending ``sums`` ``[B, N]`` are the nearest of some even point.

    The points lie from the lowest of the sums above 0 to 1. Of equal ones the first is taken.

    Args:
        n_points: at least 2; crop: whether only as many of the highest can be taken.

    Returns:
        ``[B, N]`` bool.
    """
    start = sums.masked_fill(sums <= 0, torch.inf).amin(1, keepdim=True)  # [B, 1]
    steps = torch.arange(n_points, device=sums.device)
    points = (
        torch.linspace(0, 1, n_points, device=sums.device) + start - start * steps / (n_points - 1)
    )
    first = max(0, sums.shape[1] - n_points) if crop else 0
    seen = sums[:, first:].contiguous()
    above = torch.searchsorted(seen, points.contiguous()).clamp(max=seen.shape[1] - 1)
    below = (above - 1).clamp(min=0)
    lower = points - seen.gather(1, below) <= (seen.gather(1, above) - points).abs() + TIE
    closest = seen.gather(1, torch.where(lower, below, above))
    picked = torch.searchsorted(seen, closest)  # the first of equal ones
    return pad(torch.zeros_like(seen).scatter(1, picked, 1.0), (first, 0)) > 0


def sampled(scores: Tensor, most: int, n_points: int, crop: bool = False) -> Tensor:
    """Returns the tokens sampled by the finest grid that samples at most ``most``: ``[B, N]`` bool.

    Grids have from 2 to ``n_points`` points, 32 of them where there are more; if none is coarse
    enough, nothing is sampled. So with as many as were sampled for ``most`` it is the same again.

    Args:
        scores: as of ``cumulated``; crop: as of ``nearest``.
    """
    order, sums = cumulated(scores)
    grids = torch.linspace(n_points, 2, min(GRIDS, n_points - 1)).round().int().tolist()
    found = torch.zeros_like(sums, dtype=torch.bool)
    open_rows = torch.ones_like(found[:, :1])
    for n in dict.fromkeys(grids):
        picked = nearest(sums, n, crop)
        fits = open_rows & (picked.sum(1, keepdim=True) <= most)
        found, open_rows = torch.where(fits, picked, found), open_rows & ~fits
        if not bool(open_rows.any()):
            break
    return torch.zeros_like(found).scatter(1, order, found)
