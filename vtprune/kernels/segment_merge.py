"""Weighted sums of tokens, in the same order on every device."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from vtprune.errors import ConfigError, InputError
from vtprune.kernels._common import MIB, widened
from vtprune.kernels._dispatch import launch, run


def _check(
    x: Tensor, source: Tensor, target: Tensor, weight: Tensor, n_out: int, chunk_bytes: int
) -> None:
    if x.ndim < 2 or not x.is_floating_point():
        raise InputError(f"segment_merge: x is {list(x.shape)} {x.dtype}; give floats [B, N, ...].")
    if source.ndim != 2 or not source.shape == target.shape == weight.shape:
        raise InputError(
            f"segment_merge: source {list(source.shape)}, target {list(target.shape)} and weight "
            f"{list(weight.shape)} must have one shape [B, E]."
        )
    if len(x) != len(source):
        raise InputError(f"segment_merge: x has {len(x)} rows and the edges {len(source)}.")
    if n_out < 0 or chunk_bytes < 1:
        raise ConfigError(
            f"segment_merge: n_out={n_out}, chunk_bytes={chunk_bytes}; give n_out of at least 0 "
            "and chunk_bytes of at least 1."
        )


def segment_merge(
    x: Tensor,
    source: Tensor,
    target: Tensor,
    weight: Tensor,
    n_out: int,
    *,
    chunk_bytes: int = 256 * MIB,
) -> Tensor:
    """Adds ``weight[b, e] * x[b, source[b, e]]`` to output ``target[b, e]``, for every edge e.

    Nothing is divided. Sums are taken in float32 (float64 stays), edges of one target in an order
    that only their given order decides, and without atomics: the result is the same in every run.
    A NaN spoils only the outputs that it flows into. Differentiable in ``x`` and ``weight``.

    Args:
        x: ``[B, N, ...]``.
        source: ``[B, E]`` int64 in ``[0, N)``.
        target: ``[B, E]`` int64; edges to a target outside ``[0, n_out)`` count nowhere.
        weight: ``[B, E]`` float.
        n_out: number of outputs; those without an edge are 0.
        chunk_bytes: most bytes of weighted edges held at a time, down to one row of the batch. The
            kernel holds none.

    Returns:
        ``[B, n_out, ...]`` in the dtype of ``x``.

    Raises:
        InputError: shapes that do not fit together.
        ConfigError: ``n_out`` or ``chunk_bytes`` out of range.
    """
    _check(x, source, target, weight, n_out, chunk_bytes)
    refused = "x is float64, which it would round" if x.dtype == torch.float64 else None
    reference = partial(_reference, chunk_bytes=chunk_bytes)
    args = (x, source, target, weight, n_out)
    return run("segment_merge", reference, merge_by_kernel, refused, *args)


def by_target(
    source: Tensor, target: Tensor, weight: Tensor, n_out: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the edges sorted by target, and where those of each output start.

    Returns:
        ``source``, ``target`` and ``weight`` ``[B, E]``, and offsets ``[B, n_out + 1]`` int64.
    """
    target, order = target.contiguous().sort(dim=1, stable=True)
    bounds = torch.arange(n_out + 1, device=target.device).expand(len(target), -1).contiguous()
    offsets = torch.searchsorted(target, bounds)
    return source.gather(1, order), target, weight.gather(1, order), offsets


def _reference(
    x: Tensor, source: Tensor, target: Tensor, weight: Tensor, n_out: int, *, chunk_bytes: int
) -> Tensor:
    flat = x.flatten(2) if x.ndim > 2 else x.unsqueeze(-1)
    source, _, weight, offsets = by_target(source, target, weight, n_out)
    per_row = source.shape[1] * flat.shape[2] * widened(x[:0]).element_size()
    group = max(1, chunk_bytes // max(1, per_row))
    parts = zip(*(t.split(group) for t in (flat, source, weight, offsets)), strict=True)
    merged = torch.cat([_merge(*part) for part in parts])
    return merged.to(x.dtype).reshape(len(x), n_out, *x.shape[2:])


def _merge(x: Tensor, source: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Sums the edges between consecutive ``offsets``: ``[b, N, D]`` -> ``[b, n_out, D]``."""
    rows = torch.arange(len(x), device=x.device)[:, None]
    parts = widened(x[rows, source])  # indexing: its backward, unlike gather's, is deterministic
    parts = parts * weight.to(parts.dtype).unsqueeze(-1)
    return torch.segment_reduce(parts, "sum", offsets=offsets, axis=1, unsafe=True, initial=0)


@torch.library.custom_op("vtprune::segment_merge", mutates_args=())
def merge_by_kernel(
    x: Tensor, source: Tensor, target: Tensor, weight: Tensor, n_out: int
) -> Tensor:
    """The kernel of ``segment_merge``, for gradients and graphs."""
    return launch("segment_merge", x, source, target, weight, n_out)


@merge_by_kernel.register_fake
def _(x: Tensor, source: Tensor, target: Tensor, weight: Tensor, n_out: int) -> Tensor:
    return x.new_empty(len(x), n_out, *x.shape[2:])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, source, target, weight, _ = inputs
    ctx.n = x.shape[1]
    learns = ctx.needs_input_grad[3]  # only its gradient reads x again
    ctx.save_for_backward(source, target, weight, *([x] if learns else []))


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, None, Tensor | None, None]:
    source, target, weight, *x = ctx.saved_tensors
    dx = dweight = None
    if ctx.needs_input_grad[0]:  # the same with edges turned round: it takes none from outside
        dx = merge_by_kernel(dy, target, source, weight, ctx.n)
    if x:
        dweight = _products(x[0], dy, source, target).to(weight.dtype)
    return dx, None, None, dweight, None


def _products(x: Tensor, dy: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """Returns the inner products of what each edge joins, 0 at a target outside, ``[B, E]``."""
    if not dy.shape[1]:
        return torch.zeros(target.shape, device=x.device)
    rows = torch.arange(len(x), device=x.device)[:, None]
    outside = (target < 0) | (target >= dy.shape[1])
    ends = dy[rows, target.masked_fill(outside, 0)].float()
    products = x[rows, source].float() * ends
    return products.unsqueeze(-1).flatten(2).sum(2).masked_fill(outside, 0.0)


merge_by_kernel.register_autograd(_gradients, setup_context=_keep)
