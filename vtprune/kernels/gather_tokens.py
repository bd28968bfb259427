"""The same rows of several tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from vtprune.errors import InputError


def _check(index: Tensor, tensors: tuple[Tensor, ...]) -> None:
    if index.ndim != 2 or index.dtype not in (torch.int32, torch.int64):
        raise InputError(
            f"gather_tokens: index is {list(index.shape)} {index.dtype}; give [B, K] int64."
        )
    for x in tensors:
        if x.ndim < 2 or x.shape[0] != index.shape[0]:
            raise InputError(
                f"gather_tokens: a tensor is {list(x.shape)}, but the index has "
                f"{index.shape[0]} rows; give [B, N, ...] with the same B."
            )


def gather_tokens(index: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Returns the rows ``index`` of each tensor, differentiable in the tensors.

    Args:
        index: ``[B, K]`` int64, each in ``[0, N)``.
        *tensors: each ``[B, N, ...]``.

    Returns:
        Each ``[B, K, ...]``, in the order given.

    Raises:
        InputError: shapes or an index dtype that do not fit together.
    """
    _check(index, tensors)
    index = index.long()
    out = []
    for x in tensors:
        rest = x.shape[2:]
        at = index.view(*index.shape, *(1,) * len(rest)).expand(*index.shape, *rest)
        out.append(x.gather(1, at))
    return tuple(out)
