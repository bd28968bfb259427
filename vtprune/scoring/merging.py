"""What is added to the tokens that stay, so that those that leave are not lost."""

from __future__ import annotations

import torch
from torch import Tensor

from vtprune.kernels._common import full_precision
from vtprune.kernels.gather_tokens import gather_tokens
from vtprune.kernels.topk_sorted import ranked, topk_sorted
from vtprune.scoring.diversity import nearest, outside, unit
from vtprune.scoring.matching import averaged
from vtprune.selection import Mix, Selection


def outlier_share(score: Tensor) -> list[float]:
    """Returns which share of each row of ``[B, N]`` is above Q3 + 1.5 (Q3 - Q1)."""
    quarters = torch.tensor([0.25, 0.75], device=score.device)
    low, high = torch.quantile(score.float(), quarters, dim=1)  # each [B]
    found = (score > (high + 1.5 * (high - low))[:, None]).sum(1)
    return [n / score.shape[1] for n in found.tolist()]


def gridded(score: Tensor, n_top: list[int], strides: list[int]) -> tuple[Tensor, list[int]]:
    """Puts the highest scores of each row first, then a grid, then the rest.

    Args:
        score: ``[B, N]``; n_top: per row how many go by score; strides: per row the distance of the
            positions that follow in raster order, from 0 and below N - 1.

    Returns:
        All positions in that order, ``[B, N]``, and per row how many come before the rest.
    """
    order = ranked(score)
    n = score.shape[1]
    rank = order.argsort(dim=1)
    place = torch.arange(n, device=score.device)
    top = rank < torch.tensor(n_top, device=score.device)[:, None]
    on_grid = (place % torch.tensor(strides, device=score.device)[:, None] == 0) & (place < n - 1)
    turn = torch.where(top, rank, torch.where(on_grid, n + place, 2 * n + rank))
    return turn.argsort(dim=1), (top | on_grid).sum(1).tolist()


def absorb(kept: Tensor, keys: Tensor, weight: Tensor, n_neighbours: int) -> Selection:
    """Adds its neighbours to each kept token, and all that leaves to one new token at the end.

    The neighbours are the tokens of highest cosine similarity between keys, kept ones too, as they
    were. Each counts with its own weight, the kept token with 1; nothing is divided.

    Args:
        kept: ``[B, K]`` int64, in the order of the outputs; K < N.
        keys: ``[B, N, d]``; weight: ``[B, N]``, NaN counts as 0.

    Returns:
        A selection of K + 1 outputs.
    """
    (batch, k), n = kept.shape, keys.shape[1]
    m = min(n_neighbours, n - 1)
    x, _ = unit(keys)
    with full_precision(x):
        cosine = x.gather(1, kept[..., None].expand(-1, -1, x.shape[2])) @ x.mT  # [B, K, N]
    cosine.scatter_(2, kept[..., None], -torch.inf)
    near = topk_sorted(cosine.flatten(0, 1), m).view(batch, k * m)
    others = torch.cat([near, outside(kept, n)], dim=1)
    place = torch.arange(k + 1, device=kept.device)
    target = torch.cat([place[:k], place[:k].repeat_interleave(m), place[k:].expand(n - k)])
    share = weight.float().nan_to_num(0.0, 0.0, 0.0).gather(1, others)
    return Selection(
        torch.cat([kept, kept.new_full((batch, 1), -1)], dim=1),
        n,
        Mix(
            torch.cat([kept, others], dim=1),
            target.expand(batch, -1),
            torch.cat([torch.ones_like(kept, dtype=share.dtype), share], dim=1),
        ),
    )


def into_nearest(kept: Tensor, tokens: Tensor) -> Selection:
    """Makes each kept token the mean of itself and of those that leave and resemble it most.

    Args:
        kept: ``[B, K]`` int64, in the order of the outputs; K from 1 to N.
        tokens: ``[B, N, D]``, which the cosine compares.
    """
    others = outside(kept, tokens.shape[1])
    owner = nearest(*gather_tokens(others, tokens), *gather_tokens(kept, tokens))
    into = kept.new_zeros(tokens.shape[:2]).scatter(1, others, owner)
    into.scatter_(1, kept, torch.arange(kept.shape[1], device=kept.device).expand_as(kept))
    return averaged(kept, into, torch.ones(into.shape, device=into.device))
