"""Stable top-k of rows: a binary search for the k-th highest score, then running counts."""

# pyright: reportCallIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096  # scores that a program holds at a time


@triton.jit
def _keys(scores, at, n):
    """Loads scores as int32 of the same order; NaN as -inf, -0.0 as 0.0."""
    x = tl.load(scores + at, mask=at < n, other=0.0).to(tl.float32)
    x = tl.where(x == x, x, float("-inf")) + 0.0
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _count(scores, n, least, BLOCK: tl.constexpr):
    """Returns how many scores of a row reach ``least``."""
    found = tl.zeros((), tl.int32)
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        found += tl.sum(((at < n) & (_keys(scores, at, n) >= least)).to(tl.int32), 0)
    return found


@triton.jit(do_not_specialize=["n", "k"])
def _topk(
    scores,
    index,
    inverse,
    counts,
    stride,
    n,
    k,
    RAGGED: tl.constexpr,
    MAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per row. Where rows are ragged, ``index`` ``[B, k]`` was filled with -1."""
    row = tl.program_id(0).to(tl.int64)
    scores += row * stride
    mine = k
    if RAGGED:
        mine = tl.load(counts + row)
    low = tl.full((), -2147483648, tl.int32)
    high = tl.full((), 2147483647, tl.int32)
    for _ in range(32):  # the highest threshold that at least k scores reach
        middle = (low | high) - ((low ^ high) >> 1)  # rounded up, without overflow
        enough = _count(scores, n, middle, BLOCK) >= mine
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    spare = mine
    if low < 2147483647:
        spare -= _count(scores, n, low + 1, BLOCK)
    taken = tl.zeros((), tl.int32)
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        key = _keys(scores, at, n)
        level = (at < n) & (key == low)
        before = tl.cumsum(level.to(tl.int32), 0)
        keep = ((at < n) & (key > low)) | (level & (before <= spare))
        spare -= tl.sum(level.to(tl.int32), 0)
        place = taken + tl.cumsum(keep.to(tl.int32), 0) - 1
        taken += tl.sum(keep.to(tl.int32), 0)
        tl.store(index + row * k + place, at.to(tl.int64), mask=keep)
        if MAPPED:
            place = tl.where(keep, place, -1).to(tl.int64)
            tl.store(inverse + row * n + at, place, mask=at < n)


def launch(scores: Tensor, k: int, counts: Tensor | None, mapped: bool) -> tuple[Tensor, Tensor]:
    """Returns indices ``[B, k]``, and the inverse map ``[B, N]``, or nothing of it."""
    rows, n = scores.shape
    scores = scores if scores.stride(1) == 1 else scores.contiguous()
    index = torch.empty(rows, k, dtype=torch.int64, device=scores.device)
    if counts is not None:
        index.fill_(-1)
    inverse = torch.empty(rows if mapped else 0, n, dtype=torch.int64, device=scores.device)
    if rows and n:
        block = min(TILE, triton.next_power_of_2(n))
        _topk[(rows,)](
            scores,
            index,
            inverse,
            counts,
            scores.stride(0),
            n,
            k,
            RAGGED=counts is not None,
            MAPPED=mapped,
            BLOCK=block,
            num_warps=4 if block <= 1024 else 8,
        )
    return index, inverse
