"""The k highest scores, as ascending indices, or all ranked, with a defined order of ties."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from vtprune.errors import ConfigError
from vtprune.kernels._common import check_count, check_dims, widened
from vtprune.kernels._dispatch import launch, run


@torch.no_grad()
def topk_sorted(scores: Tensor, k: int | Sequence[int]) -> Tensor:
    """Returns where the ``k`` highest scores of each row are.

    Ties go to the lower index; NaN counts as -inf; -0.0 equals 0.0. Scores of 16 bits are compared
    in float32.

    Args:
        scores: ``[B, N]`` of any float dtype.
        k: how many, from 0 to N; of each row, or one for all.

    Returns:
        ``[B, k]`` int64, ascending. Where rows have a ``k`` of their own, the highest sets the
        width, and -1 stands behind what a row has.

    Raises:
        InputError: not a float tensor of two dimensions.
        ConfigError: ``k`` out of range, or not one for each row.
    """
    return _run(scores, k, False)[0]


@torch.no_grad()
def topk_mapped(scores: Tensor, k: int | Sequence[int]) -> tuple[Tensor, Tensor]:
    """Returns ``topk_sorted``, and its inverse map.

    Returns:
        The indices; and for each of the N the place that it has among them, or -1, ``[B, N]``
        int64.
    """
    return _run(scores, k, True)


def _run(scores: Tensor, k: int | Sequence[int], mapped: bool) -> tuple[Tensor, Tensor]:
    check_dims(scores, "B, N", "topk_sorted")
    rows, n = scores.shape
    counts, width = None, cast(int, k)
    if isinstance(k, Sequence):
        if len(k) != rows:
            raise ConfigError(f"topk_sorted: k has {len(k)} counts, but there are {rows} rows.")
        for count in set(k):
            check_count(count, n, "topk_sorted")
        counts = torch.tensor(k, dtype=torch.int32).to(scores.device, non_blocking=True)
        width = max(k, default=0)
    check_count(width, n, "topk_sorted")
    refused = "scores are float64, which it would round" if scores.dtype == torch.float64 else None
    return run("topk_sorted", _reference, _kernel, refused, scores, width, counts, mapped)


def _reference(
    scores: Tensor, k: int, counts: Tensor | None, mapped: bool
) -> tuple[Tensor, Tensor]:
    n = scores.shape[1]
    index = ranked(scores)[:, :k]
    if counts is not None:
        its_own = torch.arange(k, device=index.device) < counts[:, None]
        index = index.masked_fill(~its_own, n)
    index = index.sort(dim=1).values
    if not mapped:
        return index.masked_fill(index == n, -1) if counts is not None else index, index[:0]
    inverse = index.new_full((len(index), n + 1), -1)
    inverse.scatter_(1, index, torch.arange(k, device=index.device).expand_as(index))
    return index.masked_fill(index == n, -1), inverse[:, :n].contiguous()


@torch.library.custom_op("vtprune::topk_sorted", mutates_args=())
def _kernel(scores: Tensor, k: int, counts: Tensor | None, mapped: bool) -> tuple[Tensor, Tensor]:
    return launch("topk_sorted", scores, k, counts, mapped)


@_kernel.register_fake
def _(scores: Tensor, k: int, counts: Tensor | None, mapped: bool) -> tuple[Tensor, Tensor]:
    rows, n = scores.shape
    index = scores.new_empty((rows, k), dtype=torch.int64)
    return index, scores.new_empty((rows if mapped else 0, n), dtype=torch.int64)


@torch.no_grad()
def ranked(scores: Tensor) -> Tensor:
    """Returns the positions of ``[B, N]`` scores from the highest to the lowest, ``[B, N]`` int64.

    Ties, NaN, zeros and 16 bits are treated as by ``topk_sorted``.
    """
    scores = widened(scores)
    scores = scores.masked_fill(scores.isnan(), float("-inf")) + 0.0  # -0.0 + 0.0 = 0.0
    return scores.sort(dim=1, descending=True, stable=True).indices
