"""Rows of several tensors written to places: the places are inverted, and then it is a gather."""

# pyright: reportCallIssue=false, reportArgumentType=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vtprune.kernels._triton.gather_tokens import copied

TILE = 1024


@triton.jit(do_not_specialize=["index_batch", "n", "k"])
def _invert(index, inverse, index_batch, n, k, BLOCK: tl.constexpr):
    """Writes into ``inverse`` ``[B, N]``, which is -1, where each place stands in the index."""
    b = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    place = tl.load(index + b * index_batch + at, mask=at < k, other=-1).to(tl.int64)
    tl.store(inverse + b * n + place, at, mask=(place >= 0) & (place < n))


def launch(index: Tensor, rows: list[Tensor], into: list[Tensor]) -> list[Tensor]:
    """Returns copies of ``into`` ``[B, N, ...]`` with ``rows`` ``[B, K, ...]`` at the index."""
    (batch, k), n = index.shape, into[0].shape[1]
    inverse = torch.full((batch, n), -1, dtype=torch.int64, device=index.device)
    if inverse.numel() and k:
        index = index if index.stride(1) == 1 else index.contiguous()
        block = min(TILE, triton.next_power_of_2(k))
        grid = (batch, triton.cdiv(k, block))
        _invert[grid](index, inverse, index.stride(0), n, k, BLOCK=block)
    return copied(inverse, rows, into)
