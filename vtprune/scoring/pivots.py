"""Tokens that resemble a few chosen ones the least."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vtprune.kernels.topk_sorted import ranked


def largest(x: Tensor, n: int) -> Tensor:
    """Returns where the ``n`` largest of ``x`` ``[M]`` are (M at most), in descending order.

    Ties go to the lower index; NaN comes last.
    """
    return ranked(x[None])[0, :n]


def set_order(places: Tensor) -> Tensor:
    """Returns in which order a Python set, filled from ``places`` ``[P]``, is walked through."""
    listed = places.tolist()
    order = [listed.index(place) for place in set(listed)]
    return torch.tensor(order, device=places.device)


def shares(total: int, n: int) -> list[int]:
    """Returns ``n`` counts that sum to ``total`` and differ by at most 1, larger ones first."""
    return [total // n + (i < total % n) for i in range(n)]


def least_similar(similarity: Tensor, counts: Sequence[int], taken: Tensor) -> Tensor:
    """Lets pivots take, one after the other, the free tokens that are least similar to them.

    Args:
        similarity: ``[P, N]`` of each pivot to each token; NaN counts as most similar.
        counts: how many each pivot takes.
        taken: ``[T]`` int64, tokens that are not free.

    Returns:
        ``[T + sum(counts)]`` int64, ascending: ``taken`` and all that were; ties go to the lower
        index.
    """
    stays = torch.zeros(similarity.shape[1], dtype=torch.bool, device=similarity.device)
    stays[taken] = True
    for row, count in zip(similarity.nan_to_num(nan=2.0), counts, strict=True):
        order = row.masked_fill(stays, float("inf")).sort(stable=True).indices
        stays[order[:count]] = True
    return stays.nonzero()[:, 0]
