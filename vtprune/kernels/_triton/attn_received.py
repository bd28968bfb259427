"""Launches the two passes over attention; see ``_attention.py``."""

# pyright: reportCallIssue=false
from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from vtprune.kernels._dispatch import INTERPRETING
from vtprune.kernels._triton._attention import _key_means, _log_sums

PROGRAMS = 256  # that keep a GPU busy


class Tile(NamedTuple):
    """What a program holds at a time: queries and keys; its warps, and how many loads run ahead."""

    queries: int
    keys: int
    warps: int
    stages: int


def tile(dtype: torch.dtype, rows: int, d: int, few: bool, hip: bool) -> Tile:
    """Returns the tile for ``rows`` queries of width ``d``; it fits in registers everywhere.

    float32 has no tensor cores and holds operands whole; AMD's programs share 64 KiB at most.
    """
    if dtype == torch.float32:
        most = Tile(32, 32, 8, 1)
    elif few:
        most = Tile(32, 64, 8 if hip else 4, 2)
    else:
        most = Tile(64, 64 if hip or halves(d)[1] else 128, 4, 2)
    queries = min(most.queries, max(16, triton.next_power_of_2(rows)))
    return most._replace(queries=queries, stages=1 if hip else most.stages)


def halves(d: int) -> tuple[int, int]:
    """Splits the width of a head in powers of two from 16 on; the second may be nothing."""
    first = max(16, 1 << (d.bit_length() - 1))
    return first, max(16, triton.next_power_of_2(d - first)) if d > first else 0


def launch(
    q: Tensor,
    k: Tensor,
    scale: float,
    causal: bool,
    lse: Tensor | None,
    lengths: Sequence[int] | None,
) -> Tensor:
    """Returns the mean attention that each key gets, ``[B, N]`` float32."""
    return key_means(q, k, scale, causal=causal, lse=lse, lengths=lengths)


def key_means(
    q: Tensor,
    k: Tensor,
    scale: float,
    *,
    causal: bool = False,
    lse: Tensor | None = None,
    lengths: Sequence[int] | None = None,
    seen: Tensor | None = None,
    few: bool = False,
) -> Tensor:
    """Runs the first pass, unless ``lse`` is given, and the second.

    Args:
        few: whether there are few queries, so that those of heads that share keys go together, and
            the keys of the first pass are divided among programs.
    """
    q, k = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k))
    (b, heads, m, d), n = q.shape, k.shape[2]
    stack = heads // k.shape[1] if few else 1
    held = tile(q.dtype, m * stack, d, few, torch.version.hip is not None)
    units, rows, keys = b, m * stack, n
    if lengths is not None:
        units, rows, keys = len(lengths), max(lengths), max(lengths)
    groups = units * heads // stack
    row_blocks, key_blocks = triton.cdiv(rows, held.queries), triton.cdiv(keys, held.keys)
    masks = None if seen is None else seen.view(torch.uint8), _starts(lengths, q.device)
    strides = *q.stride()[:3], *k.stride()[:3], *((0, 0) if seen is None else seen.stride())
    to_base_2, shared_by = math.log2(math.e), heads // k.shape[1]
    fixed = {
        "CAUSAL": causal,
        "PACKED": lengths is not None,
        "SEEN": seen is not None,
        "STACK": stack,
        **dict(zip(("D", "D0", "D1"), (d, *halves(d)), strict=True)),
        **dict(zip(("QUERIES", "KEYS", "num_warps", "num_stages"), held, strict=True)),
        "UPCAST": INTERPRETING,
    }
    sums, factor = None if lse is None else lse.float().contiguous()[None], to_base_2
    if sums is None:
        at_once = max(1, PROGRAMS // (row_blocks * groups)) if few else 1
        share = held.keys * triton.cdiv(key_blocks, at_once)
        sums, factor = _empty(q, triton.cdiv(keys, share), b, heads, m), 1.0
        _log_sums[(row_blocks * groups, len(sums))](
            q,
            k,
            sums,
            *masks,
            *strides,
            scale * to_base_2,
            heads,
            shared_by,
            m,
            n,
            row_blocks,
            share,
            sums.stride(0),
            **fixed,
        )
    out = _empty(q, b, heads // stack, n)
    _key_means[(key_blocks * groups,)](
        q,
        k,
        sums,
        out,
        *masks,
        *strides,
        scale * to_base_2,
        factor,
        heads,
        shared_by,
        m,
        n,
        key_blocks,
        len(sums),
        sums.stride(0),
        SPLIT=len(sums) > 1,
        **fixed,
    )
    return out.mean(1)


def _empty(q: Tensor, *shape: int) -> Tensor:
    return torch.empty(*shape, dtype=torch.float32, device=q.device)


def _starts(lengths: Sequence[int] | None, device: torch.device) -> Tensor | None:
    """Returns where sequences start, and where the last one ends."""
    if lengths is None:
        return None
    starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    return starts.to(device, non_blocking=True)
