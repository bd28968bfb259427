"""Attention to the blocks of each level in turn; blocks that are not seen cost nothing."""

# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from vtprune.kernels._dispatch import INTERPRETING
from vtprune.kernels._triton._attention import _finite, _products, _rows
from vtprune.kernels._triton.attn_received import Tile, halves
from vtprune.kernels.psa_attention import LEVELS, pyramid


@triton.jit
def _one_level(
    begin,
    q0,
    q1,
    top,
    total,
    acc0,
    acc1,
    query,
    k,
    v,
    order,
    ends,
    whole,
    scale,
    LEVEL: tl.constexpr,
    NUMBER: tl.constexpr,
    BLOCK: tl.constexpr,
    KEYS: tl.constexpr,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Takes the blocks of one level in; returns where the next one begins, and the state."""
    ROWS: tl.constexpr = BLOCK // LEVEL
    TILES: tl.constexpr = (ROWS + KEYS - 1) // KEYS
    end = tl.load(ends + NUMBER)
    first = 2 * (whole - whole // LEVEL)
    slot = tl.arange(0, KEYS)
    for step in range(begin * TILES, end * TILES):
        part = step % TILES * KEYS
        row = tl.load(order + step // TILES) * ROWS + part
        here = slot < ROWS - part
        at = (first + row).to(tl.int64) * D
        k0, k1 = _rows(k + at, slot * D, here, D, D0, D1, UPCAST)
        z = _products(q0, q1, k0, k1, D1) * scale + NUMBER  # the logarithm of LEVEL, in base 2
        seen = here[None, :] & ((row + slot + 1)[None, :] * LEVEL <= query[:, None] + 1)
        z = tl.where(seen, z, float("-inf"))
        higher = tl.maximum(top, tl.max(z, 1))
        safe = _finite(higher)
        weights, less = tl.exp2(z - safe[:, None]), tl.exp2(top - safe)
        total = total * less + tl.sum(weights, 1)
        v0, v1 = _rows(v + at, slot * D, here, D, D0, D1, UPCAST)
        weights = weights.to(v0.dtype)
        acc0 = tl.dot(weights, v0, acc0 * less[:, None], input_precision="ieee")
        if D1:
            acc1 = tl.dot(weights, v1, acc1 * less[:, None], input_precision="ieee")
        top = higher
    return end, top, total, acc0, acc1


@triton.jit
def _store(out, x, at, real, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """Stores columns of rows."""
    column = FIRST + tl.arange(0, WIDTH)
    mask = real[:, None] & (column < D)[None, :]
    tl.store(out + at[:, None] + column[None, :], x.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n", "blocks", "whole"])
def _attend(
    q,
    k,
    v,
    out,
    order,
    ends,
    q_b,
    q_h,
    q_n,
    scale,
    heads,
    shared_by,
    n,
    blocks,
    whole,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS1: tl.constexpr,
    KEYS2: tl.constexpr,
    KEYS4: tl.constexpr,
    KEYS8: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Writes ``out`` ``[B, H, N, d]``; a program has a tile of a block of queries of one head.

    ``k`` and ``v`` are pyramids of ``whole`` tokens; ``order`` ``[B, H, n, n]`` holds the blocks
    of keys by level, and ``ends`` ``[B, H, n, 4]`` where each level ends there.
    """
    TILES: tl.constexpr = (BLOCK + QUERIES - 1) // QUERIES
    pid = tl.program_id(0).to(tl.int64)
    unit = pid // (blocks * TILES)
    tile = (blocks * TILES - 1 - pid % (blocks * TILES)).to(tl.int32)  # those of most keys first
    number = tile // TILES
    within = tile % TILES * QUERIES + tl.arange(0, QUERIES)
    query = number * BLOCK + within
    real = (within < BLOCK) & (query < n)
    batch, head = unit // heads, unit % heads
    at = batch * q_b + head * q_h + query.to(tl.int64) * q_n
    q0, q1 = _rows(q, at, real, D, D0, D1, UPCAST)
    shared = (batch * (heads // shared_by) + head // shared_by) * (whole // 8 * 15) * D
    k += shared
    v += shared
    order += (unit * blocks + number) * blocks
    ends += (unit * blocks + number) * 4
    top = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    acc0 = tl.zeros((QUERIES, D0), tl.float32)
    acc1 = acc0
    if D1:
        acc1 = tl.zeros((QUERIES, D1), tl.float32)
    end, top, total, acc0, acc1 = _one_level(
        0, q0, q1, top, total, acc0, acc1, query, k, v, order, ends, whole, scale,
        1, 0, BLOCK, KEYS1, D, D0, D1, UPCAST,
    )  # fmt: skip
    end, top, total, acc0, acc1 = _one_level(
        end, q0, q1, top, total, acc0, acc1, query, k, v, order, ends, whole, scale,
        2, 1, BLOCK, KEYS2, D, D0, D1, UPCAST,
    )  # fmt: skip
    end, top, total, acc0, acc1 = _one_level(
        end, q0, q1, top, total, acc0, acc1, query, k, v, order, ends, whole, scale,
        4, 2, BLOCK, KEYS4, D, D0, D1, UPCAST,
    )  # fmt: skip
    end, top, total, acc0, acc1 = _one_level(
        end, q0, q1, top, total, acc0, acc1, query, k, v, order, ends, whole, scale,
        8, 3, BLOCK, KEYS8, D, D0, D1, UPCAST,
    )  # fmt: skip
    total = tl.where(total == 0, 1.0, total)[:, None]
    at = (unit * n + query) * D
    _store(out, acc0 / total, at, real, 0, D0, D)
    if D1:
        _store(out, acc1 / total, at, real, D0, D1, D)


def tile(dtype: torch.dtype, block: int, hip: bool) -> Tile:
    """Returns the tile; it fits in registers everywhere. float32 has no tensor cores."""
    if dtype == torch.float32:
        most = Tile(16, 32, 8, 1)
    else:
        most = Tile(64, 32, 4, 1) if hip else Tile(128, 64, 8, 2)
    return most._replace(queries=min(most.queries, max(16, triton.next_power_of_2(block))))


def constants(dtype: torch.dtype, block: int, d: int, hip: bool) -> dict[str, int]:
    """Returns the sizes that a program is made for."""
    held = tile(dtype, block, hip)
    rows = [max(16, triton.next_power_of_2(block // level)) for level in LEVELS]
    keys = {f"KEYS{level}": min(held.keys, n) for level, n in zip(LEVELS, rows, strict=True)}
    sizes = dict(zip(("D", "D0", "D1"), (d, *halves(d)), strict=True))
    how = {"num_warps": held.warps, "num_stages": held.stages}
    return {"BLOCK": block, "QUERIES": held.queries, **keys, **sizes, **how}


def ordered(levels: Tensor) -> tuple[Tensor, Tensor]:
    """Returns blocks of keys by level, ``[B, H, n, n]`` int32, and where each level ends there.

    Blocks that are not seen stand behind the last of the four ends, ``[B, H, n, 4]`` int32.
    """
    rank = torch.full_like(levels, len(LEVELS), dtype=torch.int8)
    for number, level in enumerate(LEVELS):
        rank[levels == level] = number
    place = torch.arange(levels.shape[-1], device=levels.device)
    rank = rank.masked_fill(place > place[:, None], len(LEVELS))
    ends = torch.stack([(rank <= number).sum(-1) for number in range(len(LEVELS))], dim=-1)
    return rank.argsort(dim=-1, stable=True).int(), ends.int()


def launch(q: Tensor, k: Tensor, v: Tensor, levels: Tensor, block: int, scale: float) -> Tensor:
    """Returns the attention, ``[B, H, N, d]`` in the dtype of ``v``."""
    q = q if q.stride(3) == 1 else q.contiguous()
    keys, values = (pyramid(x.float(), block).to(x.dtype) for x in (k, v))
    order, ends = ordered(levels)
    (batch, heads, n, d), blocks = q.shape, levels.shape[-1]
    fixed = constants(q.dtype, block, d, torch.version.hip is not None)
    out = torch.empty(q.shape, dtype=v.dtype, device=q.device)
    programs = batch * heads * blocks * triton.cdiv(block, fixed["QUERIES"])
    _attend[(programs,)](
        q,
        keys,
        values,
        out,
        order,
        ends,
        *q.stride()[:3],
        scale * math.log2(math.e),
        heads,
        heads // k.shape[1],
        n,
        blocks,
        blocks * block,
        UPCAST=INTERPRETING,
        **fixed,
    )
    return out
