"""Sums of attention over queries, in two passes that hold a tile of it at a time.

The first makes the log-sum-exp of each query, block of queries by block of queries; the second the
sum of each key, block of keys by block of keys, so that one program alone writes a sum.
"""

# pyright: reportCallIssue=false, reportArgumentType=false
from __future__ import annotations

import triton
import triton.language as tl

# These vary from image to image, so that no code is made for where they are 1, or divide by 16.
VARYING = ["m", "n", "blocks", "splits", "share", "apart"]


@triton.jit
def _half(
    x, at, real, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, UPCAST: tl.constexpr
):
    """Loads columns of the rows at ``at``; 0 where they are not ``real``, or wider than ``D``."""
    column = FIRST + tl.arange(0, WIDTH)
    mask = real[:, None]
    if FIRST + WIDTH > D:
        mask = mask & (column < D)[None, :]
    loaded = tl.load(x + at[:, None] + column[None, :], mask=mask, other=0.0)
    return loaded.to(tl.float32) if UPCAST else loaded


@triton.jit
def _rows(x, at, real, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, UPCAST: tl.constexpr):
    """Loads rows in two halves; without a second the first stands for it."""
    x0 = _half(x, at, real, 0, D0, D, UPCAST)
    x1 = x0
    if D1:
        x1 = _half(x, at, real, D0, D1, D, UPCAST)
    return x0, x1


@triton.jit
def _products(a0, a1, b0, b1, D1: tl.constexpr):
    """Returns the products of rows of a and b."""
    found = tl.dot(a0, tl.trans(b0), input_precision="ieee")
    if D1:
        found = tl.dot(a1, tl.trans(b1), found, input_precision="ieee")
    return found


@triton.jit
def _place(unit, starts, m, n, PACKED: tl.constexpr):
    """Returns batch, first place, number of queries and of keys of a sequence."""
    batch, first = unit, tl.zeros((), tl.int32)
    if PACKED:
        batch, first = unit * 0, tl.load(starts + unit)
        n = tl.load(starts + unit + 1) - first
        m = n
    return batch, first, m, n


@triton.jit
def _asking(row, m, group, STACK: tl.constexpr):
    """Returns head and query of rows, where ``STACK`` heads stand one behind the other."""
    if STACK == 1:
        return group + row * 0, row
    return group * STACK + row // m, row % m


@triton.jit
def _seen(query, key, real, seen, seen_m, seen_n, ahead, CAUSAL: tl.constexpr, SEEN: tl.constexpr):
    """Returns which keys queries see; the two are shaped so that they broadcast."""
    if CAUSAL:
        real = real & (key <= query + ahead)
    if SEEN:
        at = query.to(tl.int64) * seen_m + key.to(tl.int64) * seen_n
        real = real & (tl.load(seen + at, mask=real, other=0) != 0)
    return real


@triton.jit
def _finite(x):
    """Returns 0 for -inf: what is to be subtracted where nothing was seen."""
    return tl.where(x == float("-inf"), 0.0, x)


@triton.jit(do_not_specialize=VARYING)
def _log_sums(
    q,
    k,
    sums,
    seen,
    starts,
    q_b,
    q_h,
    q_m,
    k_b,
    k_h,
    k_n,
    seen_m,
    seen_n,
    scale,
    heads,
    shared_by,
    m,
    n,
    blocks,
    share,
    apart,
    CAUSAL: tl.constexpr,
    PACKED: tl.constexpr,
    SEEN: tl.constexpr,
    STACK: tl.constexpr,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Writes log-sum-exp of each query in base 2, ``sums`` ``[splits, B, H, M]``.

    A program has a block of queries of ``STACK`` heads that share their keys, and ``share`` keys.
    """
    pid, split = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    rest, groups = pid // blocks, heads // STACK
    group = rest % groups
    batch, first, mine, length = _place(rest // groups, starts, m, n, PACKED)
    row = (pid % blocks).to(tl.int32) * QUERIES + tl.arange(0, QUERIES)
    real = row < mine * STACK
    head, query = _asking(row, mine, group, STACK)
    at = batch * q_b + head * q_h + (first + query).to(tl.int64) * q_m
    q0, q1 = _rows(q, at, real, D, D0, D1, UPCAST)
    k += batch * k_b + group * STACK // shared_by * k_h
    low = tl.program_id(1) * share
    high = tl.minimum(low + share, length)
    if CAUSAL:
        high = tl.minimum(high, tl.max(tl.where(real, query, -1), 0) + length - mine + 1)
    top = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    for start in range(low, high, KEYS):
        key = start + tl.arange(0, KEYS)
        here = key < high
        k0, k1 = _rows(k, (first + key).to(tl.int64) * k_n, here, D, D0, D1, UPCAST)
        z = _products(q0, q1, k0, k1, D1) * scale
        both = real[:, None] & here[None, :]
        ahead = length - mine
        both = _seen(query[:, None], key[None, :], both, seen, seen_m, seen_n, ahead, CAUSAL, SEEN)
        z = tl.where(both, z, float("-inf"))
        higher = tl.maximum(top, tl.max(z, 1))
        safe = _finite(higher)
        total = total * tl.exp2(top - safe) + tl.sum(tl.exp2(z - safe[:, None]), 1)
        top = higher
    place = split * apart + (batch * heads + head) * m + first + query
    tl.store(sums + place, _finite(top) + tl.log2(total), mask=real)


@triton.jit
def _joined(sums, at, real, factor, splits, apart, SPLIT: tl.constexpr):
    """Loads log-sum-exp of queries in base 2, of all parts of the keys."""
    top = tl.load(sums + at, mask=real, other=0.0) * factor
    if SPLIT:
        total = tl.exp2(top - _finite(top))
        for split in range(1, splits):
            part = tl.load(sums + at + split * apart, mask=real, other=float("-inf"))
            higher = tl.maximum(top, part)
            safe = _finite(higher)
            total = total * tl.exp2(top - safe) + tl.exp2(part - safe)
            top = higher
        top = _finite(top) + tl.log2(total)
    return top


@triton.jit(do_not_specialize=VARYING)
def _key_means(
    q,
    k,
    sums,
    out,
    seen,
    starts,
    q_b,
    q_h,
    q_m,
    k_b,
    k_h,
    k_n,
    seen_m,
    seen_n,
    scale,
    factor,
    heads,
    shared_by,
    m,
    n,
    blocks,
    splits,
    apart,
    CAUSAL: tl.constexpr,
    PACKED: tl.constexpr,
    SEEN: tl.constexpr,
    STACK: tl.constexpr,
    SPLIT: tl.constexpr,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Writes the mean attention that each key gets, ``out`` ``[B, H / STACK, N]``.

    A program has a block of keys, and all queries of ``STACK`` heads that share them.
    """
    pid = tl.program_id(0).to(tl.int64)
    rest, groups = pid // blocks, heads // STACK
    group = rest % groups
    batch, first, mine, length = _place(rest // groups, starts, m, n, PACKED)
    begin = (pid % blocks).to(tl.int32) * KEYS
    key = begin + tl.arange(0, KEYS)
    here = key < length
    k += batch * k_b + group * STACK // shared_by * k_h
    k0, k1 = _rows(k, (first + key).to(tl.int64) * k_n, here, D, D0, D1, UPCAST)
    ahead = length - mine
    low = 0
    if CAUSAL:
        low = tl.maximum(begin - ahead, 0) // QUERIES * QUERIES
    rows = tl.where(begin < length, mine * STACK, 0)
    found = tl.zeros((KEYS,), tl.float32)
    for start in range(low, rows, QUERIES):
        row = start + tl.arange(0, QUERIES)
        real = row < rows
        head, query = _asking(row, mine, group, STACK)
        at = (batch * heads + head) * m + first + query
        log_sum = _joined(sums, at, real, factor, splits, apart, SPLIT)
        at = batch * q_b + head * q_h + (first + query).to(tl.int64) * q_m
        q0, q1 = _rows(q, at, real, D, D0, D1, UPCAST)
        z = _products(k0, k1, q0, q1, D1) * scale  # [keys, queries]: a warp sums within itself
        both = here[:, None] & real[None, :]
        both = _seen(query[None, :], key[:, None], both, seen, seen_m, seen_n, ahead, CAUSAL, SEEN)
        z = tl.where(both, z, float("-inf"))
        found += tl.sum(tl.exp2(z - log_sum[None, :]), 1)
    place = (batch * groups + group) * n + first + key
    tl.store(out + place, found / (mine * STACK), mask=here)
