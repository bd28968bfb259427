"""Greedy picks over a matrix of cosines: one program per image goes through all steps.

A program holds no more than a tile of the values; between steps they lie in scratch, where the
cache has them before the row of the next pick arrives.
"""

# pyright: reportCallIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096  # values that a program holds at a time
VARYING = ["n", "k"]  # with every image: no code of their own for 1 or multiples of 16
BROKEN: tl.constexpr = tl.constexpr(-1e30)  # what stands for the relevance of a broken token
NOUGHT: tl.constexpr = tl.constexpr(8 * 2.0**-23)  # of a distance: rounding leaves as much of 0
SMALLEST: tl.constexpr = tl.constexpr(1e-10)  # below it a gain counts as nothing


@triton.jit
def _distance(row, at, n):
    distance = 1.0 - tl.load(row + at, mask=at < n, other=1.0)
    return tl.where(distance > NOUGHT, distance, 0.0)


@triton.jit
def _higher(value, start, best, place):
    """Returns the highest value and where it is, of a tile and the tiles before; the first wins."""
    top, at = tl.max(value, 0, return_indices=True)
    place = tl.where(top > best, (start + at).to(tl.int64), place)
    return tl.maximum(best, top), place


@triton.jit(do_not_specialize=VARYING)
def _sweep(
    value, first, relevance, cosines, picks, weight, n, k, MODE: tl.constexpr, BLOCK: tl.constexpr
):
    """Lowers ``value`` ``[B, N]`` by each pick; the next pick is where it is highest."""
    image = tl.program_id(0).to(tl.int64)
    cosines += image * n * n
    value += image * n
    picks += image * k
    pick = tl.load(first + image)
    for step in range(k):
        tl.store(picks + step, pick)
        best = tl.full((), float("-inf"), tl.float32)
        place = tl.zeros((), tl.int64)
        for start in range(0, n, BLOCK):
            at = start + tl.arange(0, BLOCK)
            left = tl.load(value + at, mask=at < n, other=float("-inf"))
            distance = _distance(cosines + pick * n, at, n)
            if MODE == "max_sum":
                left += distance - 1.0
            elif MODE == "max_min":
                left = tl.minimum(left, distance)
            else:
                worth = tl.load(relevance + image * n + at, mask=at < n, other=0.0)
                left = tl.minimum(left, worth - weight * (1.0 - distance))
            tl.debug_barrier()  # of a small tile several threads read the same value, one stores it
            left = tl.where(at == pick, float("-inf"), left)
            tl.store(value + at, left, mask=at < n)
            best, place = _higher(left, start, best, place)
        pick = place
        tl.debug_barrier()  # all values are stored before any thread reads them again


@triton.jit
def _floor(gain, at, n):
    """Returns what is nothing but rounding of a gain, given as it was before all picks."""
    return tl.maximum(tl.load(gain + at, mask=at < n, other=0.0) * (64 * 2.0**-23), SMALLEST)


@triton.jit
def _next(gain, left, relevance, n, BLOCK: tl.constexpr):
    """Returns the most that any token adds, and which does; -inf and the most relevant if none."""
    best = tl.full((), float("-inf"), tl.float32)
    place = tl.zeros((), tl.int64)
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        adds = tl.load(left + at, mask=at < n, other=float("-inf"))
        adds = tl.where(adds > _floor(gain, at, n), adds, float("-inf"))
        best, place = _higher(adds, start, best, place)
    if best == float("-inf"):
        top = best
        for start in range(0, n, BLOCK):
            at = start + tl.arange(0, BLOCK)
            free = tl.load(left + at, mask=at < n, other=float("-inf")) > float("-inf")
            worth = tl.load(relevance + at, mask=at < n, other=0.0)
            worth = tl.where(free, worth, float("-inf"))
            top, place = _higher(worth, start, top, place)
    return best, place


@triton.jit
def _explained(factor, pick, depth, at, n, BLOCK: tl.constexpr, DEPTH: tl.constexpr):
    """Returns what ``depth`` rows of the factor say of ``pick`` and the tokens ``at``."""
    found = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, depth, DEPTH):
        rows = begin + tl.arange(0, DEPTH)
        mine = tl.load(factor + rows * n + pick, mask=rows < depth, other=0.0)
        inside = (rows < depth)[:, None] & (at < n)[None, :]
        theirs = tl.load(factor + rows[:, None] * n + at[None, :], mask=inside, other=0.0)
        found += tl.sum(mine[:, None] * theirs, 0)
    return found


@triton.jit(do_not_specialize=VARYING)
def _dpp(
    gain, left, relevance, cosines, factor, picks, n, k, BLOCK: tl.constexpr, DEPTH: tl.constexpr
):
    """Lowers the gain ``left`` ``[B, N]`` by each pick, by rows of ``factor`` ``[B, K, N]``."""
    image = tl.program_id(0).to(tl.int64)
    gain += image * n
    left += image * n
    relevance += image * n
    cosines += image * n * n
    factor += image * n * k
    picks += image * k
    for step in range(k):
        best, pick = _next(gain, left, relevance, n, BLOCK)
        tl.debug_barrier()  # all threads read the gains before any stores new ones
        tl.store(picks + step, pick)
        some = best > float("-inf")
        depth = tl.where(some, step, 0)  # once nothing adds, nothing does later
        mine = tl.load(relevance + pick)
        root = tl.sqrt_rn(tl.maximum(best, SMALLEST))
        for start in range(0, n, BLOCK):
            at = start + tl.arange(0, BLOCK)
            worth = tl.load(relevance + at, mask=at < n, other=0.0)
            worth = tl.where(worth > BROKEN, worth, 0.0)
            row = mine * (1.0 - _distance(cosines + pick * n, at, n)) * worth
            row -= _explained(factor, pick, depth, at, n, BLOCK, DEPTH)
            row = tl.where(some, tl.div_rn(row, root), 0.0)
            tl.store(factor + step * n + at, row, mask=at < n)
            rest = tl.load(left + at, mask=at < n, other=float("-inf")) - row * row
            rest = tl.where(at == pick, float("-inf"), rest)
            tl.store(left + at, rest, mask=at < n)
        tl.debug_barrier()  # all is stored before any thread reads it


def launch(
    value: Tensor,
    first: Tensor | None,
    relevance: Tensor | None,
    cosines: Tensor,
    k: int,
    mode: str,
    weight: float,
) -> Tensor:
    """Returns picks ``[B, k]``; all tensors are contiguous."""
    images, n = value.shape
    picks = torch.empty(images, k, dtype=torch.int64, device=value.device)
    if not images:
        return picks
    left = value.clone()
    block = min(TILE, triton.next_power_of_2(n))
    # What a fused product and sum do not round would pick other tokens than torch.
    fixed = {"BLOCK": block, "enable_fp_fusion": False}
    if mode == "dpp":
        factor = torch.empty(images, k, n, device=value.device)
        fixed |= {"DEPTH": 8 if block <= 2048 else 4, "num_warps": 8}
        _dpp[(images,)](value, left, relevance, cosines, factor, picks, n, k, **fixed)
    else:
        fixed |= {"MODE": mode, "num_warps": 4 if block <= 1024 else 8}
        _sweep[(images,)](left, first, relevance, cosines, picks, weight, n, k, **fixed)
    return picks
