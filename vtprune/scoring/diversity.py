"""Distances and complements between sets of tokens, and subsets that are far apart."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vtprune.kernels._common import full_precision

ONE = 1.0 - 8 * torch.finfo(torch.float32).eps  # what rounding leaves of a cosine of 1


def outside(index: Tensor, n: int) -> Tensor:
    """Returns the positions of ``0..n-1`` that are not in ``index``, ascending.

    Args:
        index: ``[B, K]`` int64, distinct within a row.

    Returns:
        ``[B, n - K]`` int64.
    """
    taken = torch.zeros(len(index), n, dtype=torch.bool, device=index.device)
    taken.scatter_(1, index, True)
    return taken.to(torch.uint8).argsort(dim=1, stable=True)[:, : n - index.shape[1]]


def nearest(tokens: Tensor, anchors: Tensor) -> Tensor:
    """Returns the anchor of highest cosine similarity for each token, ties to the lower index.

    Args:
        tokens: ``[B, M, D]``; anchors: ``[B, T, D]``. Zero vectors are similar to nothing.

    Returns:
        ``[B, M]`` int64; zeros when there is no anchor.
    """
    if not anchors.shape[1]:
        return torch.zeros(tokens.shape[:2], dtype=torch.int64, device=tokens.device)
    cosine = normalize(tokens.float(), dim=-1) @ normalize(anchors.float(), dim=-1).mT
    cosine = cosine.masked_fill(cosine > ONE, 1.0)
    best = cosine == cosine.max(-1, keepdim=True).values
    return best.to(torch.uint8).argmax(-1)


def unit(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Returns unit vectors ``[B, N, D]`` float32, zero where there is none, and what is broken.

    Broken ``[B, N]`` bool are the tokens with NaN or inf.
    """
    x = tokens.float()
    broken = ~x.isfinite().all(-1)
    return normalize(x.masked_fill(broken[..., None], 0.0), dim=-1), broken


@torch.no_grad()
def centers_from(pivot: Tensor, tokens: Tensor, k: int) -> Tensor:
    """Picks ``k`` tokens, the pivot first, each the least similar to its most similar pick.

    Similarity is the cosine; ties go to the lower index, tokens with NaN or inf come last. Work and
    memory grow with N, never with its square.

    Args:
        pivot: ``[B]`` int64; tokens: ``[B, N, D]``.

    Returns:
        ``[B, k]`` int64 in the order of the picks.
    """
    x, broken = unit(tokens)
    rows, order = torch.arange(len(x), device=x.device), torch.arange(x.shape[1], device=x.device)
    near = torch.full_like(broken, -2.0, dtype=x.dtype).masked_fill(broken, 2.0)
    picks = [pivot]
    with full_precision(x):
        while len(picks) < k:
            cosine = (x @ x[rows, picks[-1], :, None]).squeeze(-1)
            near = torch.maximum(near, cosine.masked_fill(cosine > ONE, 1.0))
            near[rows, picks[-1]] = torch.inf
            lowest = near == near.amin(1, keepdim=True)  # argmin promises no order of ties
            picks.append(torch.where(lowest, order, len(order)).amin(1))
    return torch.stack(picks[:k], dim=1)


@torch.no_grad()
def least_repeated(tokens: Tensor, k: int, at_once: int = 8) -> Tensor:
    """Drops tokens that resemble others, a few per round, until ``k`` are left.

    In each round every other token, from the first on, is compared with those between; the
    ``at_once`` with the most similar partner leave. The others of them go to the front, by falling
    similarity, so that partners change from round to round. Tokens with NaN or inf leave first.

    Args:
        tokens: ``[B, N, D]``, in an order that matters; k: from 0 to N.

    Returns:
        ``[B, k]`` int64, in no particular order.
    """
    n = tokens.shape[1]
    left = torch.arange(n if k else 0, device=tokens.device).expand(len(tokens), -1)
    x, broken = unit(tokens)
    with full_precision(x):
        while left.shape[1] > k:
            leave = min(at_once, left.shape[1] - k, (left.shape[1] + 1) // 2)
            repeated = torch.full(left.shape, -torch.inf, device=x.device)
            repeated[:, ::2] = (x[:, ::2] @ x[:, 1::2].mT).amax(-1)
            repeated = repeated.masked_fill(broken, torch.inf)
            order = repeated.sort(dim=1, descending=True, stable=True).indices[:, leave:]
            left, broken = left.gather(1, order), broken.gather(1, order)
            x = x.gather(1, order[..., None].expand(-1, -1, x.shape[2]))
    return left
