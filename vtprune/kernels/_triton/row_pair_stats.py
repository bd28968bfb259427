"""Sums of squares and products of paired rows, in one read of both."""

# pyright: reportCallIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 2048  # numbers of each tensor that a program of 4 warps holds at a time


@triton.jit(do_not_specialize=["rows", "n"])
def _stats(
    x,
    y,
    norm_x,
    norm_y,
    dot,
    x_outer,
    x_inner,
    y_outer,
    y_inner,
    rows,
    n,
    d,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Takes ``ROWS`` of ``rows`` rows, of which ``n`` lie ``inner`` apart, then comes ``outer``."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    x += (row // n * x_outer + row % n * x_inner)[:, None]
    y += (row // n * y_outer + row % n * y_inner)[:, None]
    own = (row < rows)[:, None]
    xx = tl.zeros((ROWS, BLOCK), tl.float32)
    yy = tl.zeros((ROWS, BLOCK), tl.float32)
    xy = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, d, BLOCK):
        at = (start + tl.arange(0, BLOCK))[None, :]
        here = own & (at < d)
        a = tl.load(x + at, mask=here, other=0.0).to(tl.float32)
        b = tl.load(y + at, mask=here, other=0.0).to(tl.float32)
        xx += a * a
        yy += b * b
        xy += a * b
    tl.store(norm_x + row, tl.sqrt(tl.sum(xx, 1)), mask=row < rows)
    tl.store(norm_y + row, tl.sqrt(tl.sum(yy, 1)), mask=row < rows)
    tl.store(dot + row, tl.sum(xy, 1), mask=row < rows)


def launch(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns norms of both and dot products, ``[...]`` float32."""
    shape, d = x.shape[:-1], x.shape[-1]
    norm_x, norm_y, dot = (
        torch.empty(shape, dtype=torch.float32, device=x.device) for _ in range(3)
    )
    rows = dot.numel()
    if rows:
        x, y = _planes(x), _planes(y)
        block = min(TILE, triton.next_power_of_2(max(1, d)))
        per_program = TILE // block
        _stats[(triton.cdiv(rows, per_program),)](
            x,
            y,
            norm_x,
            norm_y,
            dot,
            *x.stride()[:2],
            *y.stride()[:2],
            rows,
            x.shape[1],
            d,
            ROWS=per_program,
            BLOCK=block,
            num_warps=4,
        )
    return norm_x, norm_y, dot


def _planes(x: Tensor) -> Tensor:
    """Returns ``x`` as ``[R, N, D]``, copied only where its strides allow nothing else."""
    x = x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
    x = x[(None,) * (3 - x.ndim)] if x.ndim < 3 else x
    return x.flatten(0, -3)
