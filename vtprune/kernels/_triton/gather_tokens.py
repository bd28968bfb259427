"""Rows of several tensors in one launch, copied as words of 1 to 8 bytes."""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false
from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 1024  # words of each tensor that a program holds
MOST_ROWS = 32
WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit(do_not_specialize=["index_batch", "n", "k"])
def _gather(
    index,
    sources,
    batches,
    steps,
    others,
    other_batches,
    other_steps,
    outs,
    words,
    index_batch,
    n,
    k,
    FILLED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per ``ROWS`` of the K rows of an image, and block of words, of all tensors.

    Sources are ``[B, N, words]``, others and outs ``[B, K, words]``. Others are what stands where
    the index is outside ``[0, N)``, zeros if not ``FILLED``.
    """
    blocks = tl.cdiv(k, ROWS)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    row = ((tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    at = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None]
    source = tl.load(index + b * index_batch + row, mask=row < k, other=-1).to(tl.int64)[:, None]
    found, there, row = (source >= 0) & (source < n), (row < k)[:, None], row[:, None]
    for t in tl.static_range(len(sources)):
        fits = at < words[t]
        place = sources[t] + b * batches[t] + source * steps[t] + at
        x = tl.load(place, mask=found & fits, other=0)
        if FILLED:
            place = others[t] + b * other_batches[t] + row * other_steps[t] + at
            x = tl.where(found, x, tl.load(place, mask=there & ~found & fits, other=0))
        tl.store(outs[t] + (b * k + row) * words[t] + at, x, mask=there & fits)


def launch(index: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    """Returns rows ``[B, K, ...]`` of tensors ``[B, N, ...]``, zeros where the index is -1."""
    return copied(index, tensors, [])


def copied(index: Tensor, tensors: Sequence[Tensor], others: Sequence[Tensor]) -> list[Tensor]:
    """Returns rows ``index`` ``[B, K]`` of tensors ``[B, N, ...]``, and of others elsewhere.

    Args:
        others: each ``[B, K, ...]``, what stands where the index is -1; none = zeros.
    """
    (batch, k), n = index.shape, tensors[0].shape[1]
    outs = [torch.empty(batch, k, *x.shape[2:], dtype=x.dtype, device=x.device) for x in tensors]
    whole = [list(map(in_rows, group)) for group in (tensors, others, outs)]
    some = [t for t, out in enumerate(outs) if out.numel()]
    if not some:
        return outs
    parts = [_in_words([group[t] for group in whole if group]) for t in some]
    sources, *filled, made = zip(*parts, strict=True)  # one of each, in this order, per tensor
    rest = filled[0] if filled else ()
    words = tuple(out.shape[2] for out in made)
    block = min(TILE, triton.next_power_of_2(max(words)))
    rows = min(TILE // block, MOST_ROWS, triton.next_power_of_2(k))
    index = index if index.stride(1) == 1 else index.contiguous()
    _gather[(batch * triton.cdiv(k, rows), triton.cdiv(max(words), block))](
        index,
        sources,
        *_strides(sources),
        rest,
        *_strides(rest),
        made,
        words,
        index.stride(0),
        n,
        k,
        FILLED=bool(rest),
        ROWS=rows,
        BLOCK=block,
        num_warps=4 if rows * block >= 256 else 1,
    )
    return outs


def in_rows(x: Tensor) -> Tensor:
    """Returns ``x`` ``[B, N, ...]`` as ``[B, N, D]`` whose rows are contiguous."""
    x = x.flatten(2) if x.ndim > 2 else x.unsqueeze(2)
    return x if x.stride(2) == 1 else x.contiguous()


def _strides(tensors: Sequence[Tensor]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(x.stride(0) for x in tensors), tuple(x.stride(1) for x in tensors)


def _in_words(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Returns tensors of one dtype and width as integers, of the most bytes that suit them all."""
    size = 8
    for x in tensors:
        offsets = (x.shape[2], x.stride(0), x.stride(1), x.storage_offset())
        size = math.gcd(size, x.data_ptr(), *(offset * x.element_size() for offset in offsets))
    return [x.view(WORDS[size]) for x in tensors]
