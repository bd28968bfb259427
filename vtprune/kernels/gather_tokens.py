"""The same rows of several tensors."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vtprune.errors import InputError
from vtprune.kernels._dispatch import launch, learns, run
from vtprune.kernels.segment_merge import merge_by_kernel


def gather_tokens(index: Tensor, *tensors: Tensor, padded: bool = False) -> tuple[Tensor, ...]:
    """Returns the rows ``index`` of each tensor, differentiable in the tensors.

    The kernel copies the rows of all tensors in one launch, and adds the gradients of rows that
    repeat in a fixed order. For one tensor torch is as fast, so ``auto`` takes the kernel there
    only where gradients are wanted.

    Args:
        index: ``[B, K]`` int64 or int32, each in ``[0, N)``.
        *tensors: each ``[B, N, ...]``, of any dtype.
        padded: the index may also have -1, as ``topk_sorted`` does behind short rows: zeros.

    Returns:
        Each ``[B, K, ...]``, in the order given.

    Raises:
        InputError: shapes or an index dtype that do not fit together.
    """
    check_index(index, tensors, "gather_tokens")
    if not tensors:
        return ()
    refused = unlike(index, tensors)
    if any(x.dtype == torch.float64 and learns(x) for x in tensors):
        refused = "a tensor is float64, whose gradients it would round"
    pays = len(tensors) > 1 or learns(*tensors)
    reference = partial(_reference, padded=padded)
    return tuple(
        run("gather_tokens", reference, gather_by_kernel, refused, index, [*tensors], pays=pays)
    )


def check_index(index: Tensor, tensors: Sequence[Tensor], op: str) -> None:
    """Raises InputError unless ``index`` ``[B, K]`` can be of tensors ``[B, N, ...]``."""
    if index.ndim != 2 or index.dtype not in (torch.int32, torch.int64):
        raise InputError(f"{op}: index is {list(index.shape)} {index.dtype}; give [B, K] int64.")
    for x in tensors:
        if x.ndim < 2 or x.shape[0] != index.shape[0]:
            raise InputError(
                f"{op}: a tensor is {list(x.shape)}, but the index has {index.shape[0]} rows; "
                "give [B, N, ...] with the same B."
            )


def unlike(index: Tensor, tensors: Sequence[Tensor]) -> str | None:
    """Says why one launch cannot be of these tensors ``[B, N, ...]``."""
    for x in tensors:
        if type(x) not in (Tensor, torch.nn.Parameter):
            return f"it got a {type(x).__name__}, not a plain tensor"
        if x.device != index.device:
            return f"the index is on {index.device}, but a tensor on {x.device}"
        if x.is_complex():
            return f"a tensor is {x.dtype}"
        if x.shape[1] != tensors[0].shape[1]:
            return f"tensors have {tensors[0].shape[1]} and {x.shape[1]} rows to choose from"
    return None


def spelt_out(index: Tensor, x: Tensor) -> Tensor:
    """Returns ``index`` ``[B, K]`` for each entry of the rows of ``x``, as torch wants it."""
    rest = x.shape[2:]
    return index.long().view(*index.shape, *(1,) * len(rest)).expand(*index.shape, *rest)


def _reference(index: Tensor, tensors: Sequence[Tensor], padded: bool) -> list[Tensor]:
    if not padded:
        return [x.gather(1, spelt_out(index, x)) for x in tensors]
    out = []
    for x in tensors:
        none = (index < 0).view(*index.shape, *(1,) * (x.ndim - 2))
        out.append(x.gather(1, spelt_out(index.clamp(min=0), x)).masked_fill_(none, 0))
    return out


@torch.library.custom_op("vtprune::gather_tokens", mutates_args=())
def gather_by_kernel(index: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    """The kernel of ``gather_tokens``, for gradients and graphs; zeros where the index is -1."""
    return launch("gather_tokens", index, tensors)


@gather_by_kernel.register_fake
def _(index: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    return [x.new_empty(*index.shape, *x.shape[2:]) for x in tensors]


def _keep(ctx: Any, inputs: tuple[Tensor, list[Tensor]], output: list[Tensor]) -> None:
    index, tensors = inputs
    ctx.save_for_backward(index)
    ctx.n = [x.shape[1] for x in tensors]


def _gradients(ctx: Any, grads: list[Tensor]) -> tuple[None, list[Tensor | None]]:
    (index,) = ctx.saved_tensors
    order = torch.arange(index.shape[1], device=index.device).expand(index.shape)
    once = torch.ones(index.shape, device=index.device)
    wanted = zip(grads, ctx.n, ctx.needs_input_grad[1], strict=True)
    return None, [
        merge_by_kernel(dy, order, index.long(), once, n) if wants else None
        for dy, n, wants in wanted
    ]


gather_by_kernel.register_autograd(_gradients, setup_context=_keep)
