"""Rows of several tensors, written to the same places."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vtprune.errors import InputError
from vtprune.kernels._dispatch import launch, run
from vtprune.kernels.gather_tokens import check_index, gather_by_kernel, spelt_out, unlike


def scatter_tokens(index: Tensor, *pairs: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Returns copies of tensors with other rows at ``index``, differentiable in both.

    Undoes ``gather_tokens``. The kernel writes all tensors in one launch, after one that inverts
    the index.

    Args:
        index: ``[B, K]`` int64 or int32 in ``[0, N)``, unique in each row, or -1 = nowhere.
        *pairs: each rows ``[B, K, ...]`` and what they go into, ``[B, N, ...]``, of one dtype,
            which stays as it is.

    Returns:
        Each ``[B, N, ...]``, in the order given.

    Raises:
        InputError: shapes or dtypes that do not fit together.
    """
    rows, into = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    check_index(index, into, "scatter_tokens")
    for x, y in pairs:
        if x.dtype != y.dtype or x.shape != (*index.shape, *y.shape[2:]):
            raise InputError(
                f"scatter_tokens: rows are {list(x.shape)} {x.dtype}, but at {list(index.shape)} "
                f"places of {list(y.shape)} {y.dtype} go {[*index.shape, *y.shape[2:]]}."
            )
    if not pairs:
        return ()
    refused = unlike(index, into) or unlike(index, rows)
    return tuple(run("scatter_tokens", _reference, _kernel, refused, index, rows, into))


def _reference(index: Tensor, rows: Sequence[Tensor], into: Sequence[Tensor]) -> list[Tensor]:
    out = []
    for x, y in zip(rows, into, strict=True):
        n = y.shape[1]
        last = y.new_zeros(len(y), 1, *y.shape[2:])  # takes what goes nowhere
        at = spelt_out(torch.where(index < 0, n, index), x)
        out.append(torch.cat([y, last], dim=1).scatter(1, at, x)[:, :n])
    return out


@torch.library.custom_op("vtprune::scatter_tokens", mutates_args=())
def _kernel(index: Tensor, rows: list[Tensor], into: list[Tensor]) -> list[Tensor]:
    return launch("scatter_tokens", index, rows, into)


@_kernel.register_fake
def _(index: Tensor, rows: list[Tensor], into: list[Tensor]) -> list[Tensor]:
    return [y.new_empty(y.shape) for y in into]


def _keep(ctx: Any, inputs: tuple[Tensor, Any, Any], output: list[Tensor]) -> None:
    ctx.save_for_backward(inputs[0])


def _gradients(
    ctx: Any, grads: list[Tensor]
) -> tuple[None, list[Tensor | None], list[Tensor | None]]:
    (index,) = ctx.saved_tensors
    from_rows, from_into = ctx.needs_input_grad[1:]
    rows: list[Tensor | None] = []
    into: list[Tensor | None] = []
    for dy, of_row, of_into in zip(grads, from_rows, from_into, strict=True):
        none = dy.new_zeros((1, 1, *dy.shape[2:])).expand(*index.shape, *dy.shape[2:])
        rows.append(gather_by_kernel(index, [dy])[0] if of_row else None)
        into.append(_kernel(index, [none], [dy])[0] if of_into else None)
    return None, rows, into


_kernel.register_autograd(_gradients, setup_context=_keep)
