"""Tokens ranked by the attention graph: who is heard by those that are heard."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vtprune.kernels._common import full_precision
from vtprune.kernels.topk_sorted import topk_sorted
from vtprune.scoring.diversity import ONE, outside, unit

STEP = 2.0**-20  # of a score of mean 1: what sums in another order may differ by
VARIANCE = (0.01, 0.7)  # of scores of mean 1, between which a head tells tokens apart


def page_rank(maps: Tensor, rounds: int, boosted: bool) -> Tensor:
    """Returns how important each head finds each token, ``[B, H, S]`` float32, of sum 1.

    Every token gives its importance to the tokens that it attends to, ``rounds`` times.

    Args:
        maps: ``[B, H, S, S]`` attention from query to key; of any row sums above 0, and of NaN 0.
        boosted: whether the first token begins with the square root of S times as much as others.
    """
    maps = maps.float().nan_to_num(0.0, 0.0, 0.0)
    maps = maps / maps.sum(-1, keepdim=True).clamp(min=torch.finfo(maps.dtype).tiny)
    length = maps.shape[-1]
    votes = maps.new_ones(*maps.shape[:2], 1, length)
    if boosted:
        first = torch.arange(length, device=maps.device) == 0
        votes = votes.masked_fill(first, math.sqrt(length))
    votes = votes / votes.sum(-1, keepdim=True)
    with full_precision(maps):
        for _ in range(rounds):
            votes = votes @ maps
    return votes.squeeze(2)


def over_heads(votes: Tensor, between: tuple[float, float] = VARIANCE) -> Tensor:
    """Returns the root mean square over the heads that tell tokens apart, ``[B, S]`` float32.

    Those are the heads whose scores, scaled to a mean of 1, have a variance in that range; all,
    where no head of an image has. It is rounded, so that equal tokens tie.

    Args:
        votes: ``[B, H, S]``.
    """
    scaled = votes * votes.shape[-1]
    spread = scaled.var(-1, correction=0)  # [B, H]
    good = (spread >= between[0]) & (spread <= between[1])
    good = good | ~good.any(1, keepdim=True)
    share = good.float() / good.sum(1, keepdim=True)
    mean = (scaled.square() * share[..., None]).sum(1).sqrt()
    return (mean / STEP).round() * STEP


def unlike(keys: Tensor, importance: Tensor, r: int) -> Tensor:
    """Returns all tokens but ``r`` of the less important half that resemble one of the other half.

    Ties stay at the lower index.

    Args:
        keys: ``[B, N, D]``, compared by their cosine; tokens with NaN or inf leave first.
        importance: ``[B, N]``; of equal ones the lower index is more important.
        r: up to N // 2.

    Returns:
        ``[B, N - r]`` int64, ascending.
    """
    n = keys.shape[1]
    x, broken = unit(keys)
    more = topk_sorted(importance, n - n // 2)
    less = outside(more, n)
    a, b = (x.gather(1, half[..., None].expand(-1, -1, x.shape[2])) for half in (less, more))
    with full_precision(x):
        alike = a @ b.mT
    alike = alike.masked_fill(alike > ONE, 1.0)
    alike = alike.masked_fill(broken.gather(1, more)[:, None], -1.0).amax(-1)
    alike = alike.masked_fill(broken.gather(1, less), torch.inf)
    stays = less.gather(1, topk_sorted(-alike, less.shape[1] - r))
    return torch.cat([more, stays], dim=1).sort(dim=1).values


def among(maps: Tensor, left: Tensor, n_prefix: int) -> Tensor:
    """Returns the rows and columns of the prefix and of the tokens that are ``left``.

    Args:
        maps: ``[B, H, S, S]``; left: ``[B, K]`` int64, among the tokens after the prefix.

    Returns:
        ``[B, H, n_prefix + K, n_prefix + K]``.
    """
    prefix = torch.arange(n_prefix, device=left.device).expand(len(left), -1)
    at = torch.cat([prefix, left + n_prefix], dim=1)[:, None, :, None]
    rows = maps.gather(2, at.expand(-1, maps.shape[1], -1, maps.shape[3]))
    return rows.gather(3, at.mT.expand(-1, maps.shape[1], rows.shape[2], -1))
