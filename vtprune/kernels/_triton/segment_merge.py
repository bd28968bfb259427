"""Weighted sums over edges that are sorted by target, without atomics.

A program sums the edges of one output. Where an output has more than ``CHUNK``, other programs sum
its chunks of that many before, so that none takes long. Chunks start where the output's edges do:
what it sums to depends on no other output.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vtprune.kernels._triton.gather_tokens import in_rows
from vtprune.kernels.segment_merge import by_target

CHUNK = 256  # edges
EDGES = 8  # that a program reads at a time
WIDEST = 256  # features of a program


@triton.jit
def _sum(x, source, weight, first, last, n, x_step, at, d, EDGES: tl.constexpr):
    """Returns the sum of edges from ``first`` to before ``last``; sources outside give nothing."""
    total = tl.zeros((EDGES, at.shape[0]), tl.float32)
    for start in range(first, last, EDGES):
        edge = start + tl.arange(0, EDGES)
        row = tl.load(source + edge, mask=edge < last, other=-1).to(tl.int64)
        there = (row >= 0) & (row < n)
        share = tl.load(weight + edge, mask=there, other=0.0).to(tl.float32)
        mask = there[:, None] & (at < d)[None]
        part = tl.load(x + (row * x_step)[:, None] + at[None], mask=mask, other=0.0)
        total += part.to(tl.float32) * share[:, None]
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["x_batch", "n", "n_out", "n_edges"])
def _chunks(
    x,
    source,
    target,
    weight,
    offsets,
    partial,
    x_batch,
    x_step,
    n,
    d,
    n_out,
    n_edges,
    CHUNK: tl.constexpr,
    EDGES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums the chunks that start within ``CHUNK`` edges, into ``partial`` ``[B, cells, 2, D]``.

    There are two at most, of the outputs that the first and the last of these edges go to: one
    that starts in between and ends there too is not long.
    """
    cells = tl.cdiv(n_edges, CHUNK)
    b = (tl.program_id(0) // cells).to(tl.int64)
    cell = tl.program_id(0) % cells
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    begin = cell.to(tl.int64) * CHUNK
    target += b * n_edges
    for slot in tl.static_range(2):
        edge = begin
        if slot == 1:
            edge = tl.minimum(begin + CHUNK, n_edges) - 1
        group = tl.load(target + edge)
        inside = (group >= 0) & (group < n_out)
        first = tl.load(offsets + b * (n_out + 1) + group, mask=inside, other=0)
        last = tl.load(offsets + b * (n_out + 1) + group + 1, mask=inside, other=0)
        taken = inside & (last - first > CHUNK)
        start = first
        if slot == 0:
            start += tl.cdiv(begin - first, CHUNK) * CHUNK
        else:
            taken &= first > begin
        if taken & (start < last):
            found = _sum(
                x + b * x_batch,
                source + b * n_edges,
                weight + b * n_edges,
                start,
                tl.minimum(start + CHUNK, last),
                n,
                x_step,
                at,
                d,
                EDGES,
            )
            place = ((b * cells + cell) * 2 + slot) * d + at
            tl.store(partial + place, found, mask=at < d)


@triton.jit(do_not_specialize=["x_batch", "n", "n_out", "n_edges"])
def _merge(
    x,
    source,
    weight,
    offsets,
    partial,
    out,
    x_batch,
    x_step,
    n,
    d,
    n_out,
    n_edges,
    LONG: tl.constexpr,
    CHUNK: tl.constexpr,
    EDGES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per output and block of its features."""
    b = (tl.program_id(0) // n_out).to(tl.int64)
    group = tl.program_id(0) % n_out
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    offsets += b * (n_out + 1) + group
    first, last = tl.load(offsets), tl.load(offsets + 1)
    x += b * x_batch
    source += b * n_edges
    weight += b * n_edges
    stop = last
    if LONG:
        stop = tl.where(last - first > CHUNK, first, last)
    total = _sum(x, source, weight, first, stop, n, x_step, at, d, EDGES)
    if LONG:
        cell = b * tl.cdiv(n_edges, CHUNK) + first // CHUNK
        slot = tl.where(first % CHUNK == 0, 0, 1)
        for _ in range(stop, last, CHUNK):
            place = partial + (cell * 2 + slot) * d + at
            total += tl.load(place, mask=at < d, other=0.0)
            cell += 1
            slot = tl.zeros_like(slot)
    place = out + (b * n_out + group) * d + at
    tl.store(place, total.to(out.dtype.element_ty), mask=at < d)


def launch(x: Tensor, source: Tensor, target: Tensor, weight: Tensor, n_out: int) -> Tensor:
    """Returns the outputs ``[B, n_out, ...]`` in the dtype of ``x``."""
    out = torch.empty(len(x), n_out, *x.shape[2:], dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    source, target, weight, offsets = by_target(source, target, weight, n_out)
    flat, n_edges = in_rows(x), source.shape[1]
    (batch, n, d), long = flat.shape, n_edges > CHUNK
    cells = triton.cdiv(n_edges, CHUNK) if long else 0
    partial = torch.empty(batch, cells, 2, d, dtype=torch.float32, device=x.device)
    sizes = (flat.stride(0), flat.stride(1), n, d, n_out, n_edges)
    block = min(WIDEST, max(16, triton.next_power_of_2(d)))
    fixed = {"CHUNK": CHUNK, "EDGES": EDGES, "BLOCK": block, "num_warps": 4 if block > 64 else 1}
    blocks = triton.cdiv(d, block)
    if long:
        _chunks[(batch * cells, blocks)](
            flat, source, target, weight, offsets, partial, *sizes, **fixed
        )
    _merge[(batch * n_out, blocks)](
        flat, source, weight, offsets, partial, out, *sizes, LONG=long, **fixed
    )
    return out
