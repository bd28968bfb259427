"""Cosines and values that greedy_select starts from, and its loops in torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import threshold

from vtprune.kernels._common import widened

DistanceTo = Callable[[Tensor], Tensor]  # indices [b] -> distances [b, N] to these tokens
_BROKEN = -1e30  # below every value: a token with NaN or inf is picked after all others
_TAKEN = float("-inf")
_SMALLEST = 1e-10  # below it what a token adds to a determinant counts as nothing
_BLOCK = 512  # rows of a matrix product


def units_of(features: Tensor) -> tuple[Tensor, Tensor]:
    """Returns unit vectors ``[b, N, D]``, zero where there is none, and which tokens are broken."""
    x = widened(features)
    norm = x.norm(dim=-1, keepdim=True)
    units = x / norm.clamp_min(torch.finfo(x.dtype).tiny)
    broken = ~norm.isfinite()
    return units.masked_fill_(broken, 0.0), broken.squeeze(-1)


def _distance(cosine: Tensor) -> Tensor:
    """Returns cosine distances; what rounding leaves of 0 is 0."""
    return threshold(1.0 - cosine, 8 * torch.finfo(cosine.dtype).eps, 0.0)


def matrix_of(units: Tensor) -> Tensor:
    """Returns all cosines ``[b, N, N]``; one half is computed, the other copied."""
    n = units.shape[1]
    out = units.new_empty(len(units), n, n)
    for i in range(0, n, _BLOCK):
        part = units[:, i : i + _BLOCK] @ units[:, i:].mT
        out[:, i : i + _BLOCK, i:] = part
        out[:, i + _BLOCK :, i : i + _BLOCK] = part[:, :, _BLOCK:].mT
    return out


def _rows_of(units: Tensor, matrix: Tensor | None) -> DistanceTo:
    """Returns a function that reads distances from the matrix, or computes them."""
    rows = torch.arange(len(units), device=units.device)
    if matrix is not None:
        return lambda pick: _distance(matrix[rows, pick])
    return lambda pick: _distance((units @ units[rows, pick, :, None]).squeeze(-1))


def _nearest(cosine: Tensor, start: int) -> Tensor:
    """Returns the distance to the nearest other token of rows ``start ..`` of the matrix.

    The tokens' own entries in ``cosine`` are lost.
    """
    cosine.diagonal(start, 1, 2).fill_(-1.0)
    return _distance(cosine.amax(2))


def _farthest_from_others(units: Tensor, matrix: Tensor | None, step: int) -> Tensor:
    """Returns ``[b, N]`` distances to the nearest other token, ``step`` rows at a time."""
    if matrix is not None:
        return _nearest(matrix, 0)
    starts = range(0, units.shape[1], step)
    parts = [_nearest(units[:, i : i + step] @ units.mT, i) for i in starts]
    return torch.cat(parts, dim=1)


def start(
    units: Tensor,
    broken: Tensor,
    given: Tensor | None,
    matrix: Tensor | None,
    mode: str,
    weight: float,
    gram_bytes: int,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Returns what the loops begin with.

    The values ``[b, N]`` that picks lower; the first pick ``[b]``, which ``dpp`` finds itself; and
    the relevance ``[b, N]`` of the modes that take one, -1e30 where a token is.
    """
    unset = torch.full_like(broken, float("inf"), dtype=units.dtype).masked_fill(broken, _BROKEN)
    if given is None:
        step = max(1, gram_bytes // (units.shape[1] * units.element_size()))
        first = _farthest_from_others(units, matrix, step).masked_fill(broken, _BROKEN)
        return unset, first.argmax(1), None
    if mode == "max_sum":
        return unset.masked_fill(~broken, 0.0), given, None
    relevance = given.to(units.dtype)
    broken = broken | ~relevance.isfinite()
    if mode == "dpp":
        gain = relevance.square().masked_fill(broken | ~units.any(-1), 0.0)
        return gain, None, relevance.masked_fill(broken, _BROKEN)
    if weight:  # else the order alone counts, and rounding would make ties
        relevance = _scaled(relevance, broken)
    relevance = relevance.masked_fill(broken, _BROKEN)
    return unset, relevance.argmax(1), relevance


def _scaled(relevance: Tensor, broken: Tensor) -> Tensor:
    """Returns relevance from 0 to 1 over the sound tokens of each row; all 0 where it is equal."""
    low = relevance.masked_fill(broken, float("inf")).amin(1, keepdim=True)
    high = relevance.masked_fill(broken, float("-inf")).amax(1, keepdim=True)
    return torch.where(high > low, (relevance - low) / (high - low), 0.0)


def picks_of(
    units: Tensor,
    value: Tensor,
    first: Tensor | None,
    relevance: Tensor | None,
    cosines: Tensor | None,
    k: int,
    mode: str,
    weight: float,
) -> Tensor:
    """Returns the picks ``[b, k]`` from what ``start`` returned."""
    distance_to = _rows_of(units, cosines)
    if first is None:
        return _dpp(value, cast(Tensor, relevance), distance_to, k)
    return _sweep(value, first, relevance, distance_to, k, mode, weight)


def _sweep(
    value: Tensor,
    pick: Tensor,
    relevance: Tensor | None,
    distance_to: DistanceTo,
    k: int,
    mode: str,
    weight: float,
) -> Tensor:
    """Picks ``[b, k]``, the first ``pick`` ``[b]``, each next one where ``value`` is largest.

    ``value`` ``[b, N]`` only falls, by each pick: in ``max_min`` to the distance from it, in
    ``mmr`` to the relevance less the weighted cosine, in ``max_sum`` by the cosine.
    """
    picks = torch.empty(len(value), k, dtype=torch.int64, device=value.device)
    for step in range(k):
        picks[:, step] = pick
        distance = distance_to(pick)
        if mode == "max_sum":
            value = value + (distance - 1.0)  # less a constant, so that sums stay small and exact
        elif relevance is None:
            value = torch.minimum(value, distance)
        else:
            value = torch.minimum(value, relevance - weight * (1.0 - distance))
        value.scatter_(1, pick[:, None], _TAKEN)
        pick = value.argmax(1)  # of equal values the first
    return picks


def _dpp(gain: Tensor, relevance: Tensor, distance_to: DistanceTo, k: int) -> Tensor:
    """Greedy maximum-determinant picks ``[b, k]`` by an incremental Cholesky factor.

    ``gain`` ``[b, N]``, what each token adds to the determinant, only falls. Once it is nothing
    but rounding for all that are left (more picks than dimensions), the most relevant ones follow.
    """
    b, n = relevance.shape
    picks = torch.empty(b, k, dtype=torch.int64, device=relevance.device)
    factor = relevance.new_zeros(b, k, n)
    floor = (64 * torch.finfo(gain.dtype).eps * gain).clamp_(min=_SMALLEST)
    gain, rest = gain.clone(), relevance.clone()
    relevance = relevance.masked_fill(relevance == _BROKEN, 0.0)
    for step in range(k):
        adds = gain > floor
        some = adds.any(1, keepdim=True)
        value = torch.where(some, torch.where(adds, gain, _TAKEN), rest)
        pick = value.argmax(1)
        at = pick[:, None]
        picks[:, step] = pick
        row = relevance.gather(1, at) * (1.0 - distance_to(pick)) * relevance
        if step:
            before = factor[:, :step]
            column = before.gather(2, at[:, None].expand(-1, step, -1))
            row -= (column.mT @ before).squeeze(1)
        row /= gain.gather(1, at).clamp(min=_SMALLEST).sqrt()
        row = torch.where(some, row, 0.0)
        factor[:, step] = row
        gain.sub_(row.square_()).scatter_(1, at, _TAKEN)
        rest.scatter_(1, at, _TAKEN)
    return picks
