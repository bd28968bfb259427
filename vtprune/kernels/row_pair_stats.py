"""Lengths of the rows of two tensors, and their products row by row, each row read once."""

from __future__ import annotations

import torch
from torch import Tensor

from vtprune.errors import InputError
from vtprune.kernels._common import widened
from vtprune.kernels._dispatch import launch, run

EPS = 1e-8  # of torch's cosine_similarity
Stats = tuple[Tensor, Tensor, Tensor]


@torch.no_grad()
def row_pair_stats(x: Tensor, y: Tensor) -> Stats:
    """Returns how long each row is, and the dot product of each row of ``x`` with that of ``y``.

    Computed in float32; float64 stays. Not differentiable.

    Args:
        x, y: ``[..., D]`` of any float dtypes and strides; a view of one row for all is fine.

    Returns:
        Norms of ``x``, norms of ``y`` and dot products, ``[...]`` each.

    Raises:
        InputError: shapes that differ, or no float tensors.
    """
    floats = x.is_floating_point() and y.is_floating_point()
    if not floats or x.shape != y.shape or x.ndim == 0:
        raise InputError(
            f"row_pair_stats: got {list(x.shape)} {x.dtype} and {list(y.shape)} {y.dtype}; give "
            "two float tensors of one shape [..., D]; expand what is the same for all rows."
        )
    wide = torch.float64 in (x.dtype, y.dtype)
    refused = "rows are float64, which it would round" if wide else None
    return run("row_pair_stats", _reference, _kernel, refused, x, y)


def cosine(norm_x: Tensor, norm_y: Tensor, dot: Tensor) -> Tensor:
    """Returns the cosine of rows from their ``row_pair_stats``, in the same shape.

    As in ``torch.nn.functional.cosine_similarity`` a norm counts as at least 1e-8, so that it is 0
    where a row is.
    """
    return dot / norm_x.clamp(min=EPS) / norm_y.clamp(min=EPS)


def _reference(x: Tensor, y: Tensor) -> Stats:
    x, y = widened(x), widened(y)
    return x.norm(dim=-1), y.norm(dim=-1), (x * y).sum(-1)


@torch.library.custom_op("vtprune::row_pair_stats", mutates_args=())
def _kernel(x: Tensor, y: Tensor) -> Stats:
    return launch("row_pair_stats", x, y)


@_kernel.register_fake
def _(x: Tensor, y: Tensor) -> Stats:
    norm_x, norm_y, dot = (x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(3))
    return norm_x, norm_y, dot
