"""The k highest scores, as ascending indices, or all ranked, with a defined order of ties."""

from __future__ import annotations

import torch
from torch import Tensor

from vtprune.kernels._common import check_count, check_dims, widened


@torch.no_grad()
def topk_sorted(scores: Tensor, k: int) -> Tensor:
    """Returns where the ``k`` highest scores of each row are.

    Ties go to the lower index; NaN counts as -inf; -0.0 equals 0.0. Scores of 16 bits are compared
    in float32.

    Args:
        scores: ``[B, N]`` of any float dtype.
        k: how many, from 0 to N.

    Returns:
        ``[B, k]`` int64, ascending.

    Raises:
        InputError: not a float tensor of two dimensions.
        ConfigError: ``k`` out of range.
    """
    check_dims(scores, "B, N", "topk_sorted")
    check_count(k, scores.shape[1], "topk_sorted")
    return ranked(scores)[:, :k].sort(dim=1).values


@torch.no_grad()
def ranked(scores: Tensor) -> Tensor:
    """Returns the positions of ``[B, N]`` scores from the highest to the lowest, ``[B, N]`` int64.

    Ties, NaN, zeros and 16 bits are treated as by ``topk_sorted``.
    """
    scores = widened(scores)
    scores = scores.masked_fill(scores.isnan(), float("-inf")) + 0.0  # -0.0 + 0.0 = 0.0
    return scores.sort(dim=1, descending=True, stable=True).indices
