"""Tokens that are merged into their most similar partner of the other half."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vtprune.kernels._common import full_precision
from vtprune.kernels.topk_sorted import topk_sorted
from vtprune.scoring.diversity import outside, unit
from vtprune.selection import Mix, Selection


def n_staying(n: int, entered: int, k: int, stage: int, stages: int) -> int:
    """Returns how many of ``n`` tokens a stage leaves, so that the last of them leaves ``k``.

    Each merges equally many, the first ones one more where that does not come out even; but at most
    as many stay as the later stages can halve to ``k``.

    Args:
        n: tokens at this stage; entered: those at the first; k: from 1 to ``entered``.
        stage: 0-based number of this stage.
        stages: how many there are.
    """
    each, rest = divmod(entered - k, stages)
    even = entered - each * (stage + 1) - min(rest, stage + 1)
    return min(n, max(k, min(even, k << (stages - 1 - stage))))


def halves(n: int, n_prefix: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Returns the tokens at even and those at odd places of their sequence, prefix included.

    Returns:
        Positions among the ``n`` tokens after the prefix, ascending.
    """
    order = torch.arange(n, device=device)
    return order[n_prefix % 2 :: 2], order[1 - n_prefix % 2 :: 2]


def closest(similarity: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Returns the ``r`` rows with the best partners, ascending, and the partner of each.

    Args:
        similarity: ``[B, M, P]``; NaN is the lowest. Ties go to the lower index.

    Returns:
        Two ``[B, r]`` int64.
    """
    best, partner = similarity.nan_to_num(nan=-torch.inf).max(-1)
    source = topk_sorted(best, r)
    return source, partner.gather(1, source)


def match(metric: Tensor, r: int, n_prefix: int = 0) -> tuple[Tensor, Tensor]:
    """Puts ``r`` tokens at even places into the most similar token at an odd place.

    Similarity is the cosine; tokens with NaN or inf resemble none.

    Args:
        metric: ``[B, N, D]``; r: up to N // 2.
        n_prefix: tokens before the first, which take places but no part.

    Returns:
        The tokens that are left, ``[B, N - r]`` int64, those at even places before those at odd
        ones; and which of these outputs each token goes into, ``[B, N]`` int64.
    """
    (batch, n), device = metric.shape[:2], metric.device
    even, odd = halves(n, n_prefix, device)
    x, broken = unit(metric)
    with full_precision(x):
        similarity = x[:, even] @ x[:, odd].mT
    hidden = broken[:, even, None] | broken[:, None, odd]
    source, partner = closest(similarity.masked_fill(hidden, -torch.inf), r)
    rows = torch.cat([even[outside(source, len(even))], odd.expand(batch, -1)], dim=1)
    return rows, goes_into(rows, even[source], odd[partner], n)


def goes_into(rows: Tensor, source: Tensor, partner: Tensor, n: int) -> Tensor:
    """Returns which of the outputs each of ``n`` tokens goes into, ``[B, n]`` int64.

    Args:
        rows: ``[B, K]`` int64, the tokens that are left.
        source: ``[B, n - K]`` int64, the others; partner: which of ``rows`` each goes into.
    """
    order = torch.arange(n, device=rows.device).expand(len(rows), n)
    place = torch.zeros_like(order).scatter(1, rows, order[:, : rows.shape[1]])
    return place.gather(1, order.scatter(1, source, partner))


def merge_down(
    metric: Tensor,
    size: Tensor,
    k: int,
    n_prefix: int = 0,
    pair: Callable[[Tensor, int, int], tuple[Tensor, Tensor]] = match,
) -> tuple[Tensor, Tensor]:
    """Matches tokens until ``k`` are left.

    Where more than half are to leave, what is left is matched again, by the mean of its metric.

    Args:
        metric: ``[B, N, D]``; size: ``[B, N]`` float32, above 0; k: from 1 to N - 1.
        n_prefix: tokens before the first, which take places but no part.
        pair: what matches; takes and returns what ``match`` does.

    Returns:
        As ``match``: ``[B, k]`` and ``[B, N]``.
    """
    rows = into = torch.arange(size.shape[1], device=size.device).expand_as(size)
    metric, part = metric.float(), size
    while (n := metric.shape[1]) > k:
        left, goes = pair(metric, min(n - k, n // 2), n_prefix)
        step = averaged(left, goes, part)
        metric, part = step.apply(metric), step.total(part)
        rows, into = rows.gather(1, left), goes.gather(1, into)
    return rows, into


def ascending(rows: Tensor, into: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the outputs of ``match`` in the order of their places."""
    rows, order = rows.sort(dim=1)
    return rows, order.argsort(dim=1).gather(1, into)


def averaged(rows: Tensor, into: Tensor, size: Tensor) -> Selection:
    """Makes each output the mean of its tokens, weighted by how much each stands for.

    Args:
        rows: ``[B, K]`` int64, the place of each output; into: ``[B, N]`` int64, the output that
            each token goes into.
        size: ``[B, N]`` float32, above 0.
    """
    total = torch.zeros(rows.shape, device=size.device).scatter_add_(1, into, size)
    source = torch.arange(size.shape[1], device=size.device).expand_as(into)
    return Selection(rows, size.shape[1], Mix(source, into, size / total.gather(1, into)))
