"""Weighted sums of tokens, in the same order on every device."""

from __future__ import annotations

import torch
from torch import Tensor

from vtprune.errors import ConfigError, InputError
from vtprune.kernels._common import MIB, widened


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


def _merge(x: Tensor, source: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Sums the edges between consecutive ``offsets``: ``[b, N, D]`` -> ``[b, n_out, D]``."""
    rows = torch.arange(len(x), device=x.device)[:, None]
    parts = widened(x[rows, source])  # indexing: its backward, unlike gather's, is deterministic
    parts = parts * weight.to(parts.dtype).unsqueeze(-1)
    return torch.segment_reduce(parts, "sum", offsets=offsets, axis=1, unsafe=True, initial=0)


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

    Nothing is divided. Sums are taken in float32 (float64 stays), edges of one target in their
    given order and without atomics: the result is the same in every run. A NaN spoils only the
    outputs that it flows into. Differentiable in ``x`` and ``weight``.

    Args:
        x: ``[B, N, ...]``.
        source: ``[B, E]`` int64 in ``[0, N)``.
        target: ``[B, E]`` int64; edges to a target outside ``[0, n_out)`` count nowhere.
        weight: ``[B, E]`` float.
        n_out: number of outputs; those without an edge are 0.
        chunk_bytes: most bytes of weighted edges held at a time, down to one row of the batch.

    Returns:
        ``[B, n_out, ...]`` in the dtype of ``x``.

    Raises:
        InputError: shapes that do not fit together.
        ConfigError: ``n_out`` or ``chunk_bytes`` out of range.
    """
    _check(x, source, target, weight, n_out, chunk_bytes)
    flat = x.flatten(2) if x.ndim > 2 else x.unsqueeze(-1)
    target, order = target.sort(dim=1, stable=True)
    source, weight = source.gather(1, order), weight.gather(1, order)
    bounds = torch.arange(n_out + 1, device=x.device).expand(len(x), -1).contiguous()
    offsets = torch.searchsorted(target.contiguous(), bounds)
    per_row = source.shape[1] * flat.shape[2] * widened(x[:0]).element_size()
    group = max(1, chunk_bytes // max(1, per_row))
    parts = zip(*(t.split(group) for t in (flat, source, weight, offsets)), strict=True)
    merged = torch.cat([_merge(*part) for part in parts])
    return merged.to(x.dtype).reshape(len(x), n_out, *x.shape[2:])
