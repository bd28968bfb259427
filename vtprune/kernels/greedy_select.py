"""Greedy picks that depend on what was picked before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import threshold

from vtprune.errors import ConfigError, InputError
from vtprune.kernels._common import MIB, check_count, check_dims, full_precision, widened

Mode = Literal["max_min", "max_sum", "dpp"]
DistanceTo = Callable[[Tensor], Tensor]  # indices [b] -> distances [b, N] to these tokens
_BROKEN = -1e30  # below every value: a token with NaN or inf is picked after all others
_TAKEN = float("-inf")
_SMALLEST = 1e-10  # below it what a token adds to a determinant counts as nothing
_BLOCK = 512  # rows of a matrix product
_ROWS_OF_MATRIX = 16  # the whole matrix costs about as much as N / 16 rows, one by one


def _units(features: Tensor) -> tuple[Tensor, Tensor]:
    """Returns unit vectors ``[b, N, D]``, zero where there is none, and which tokens are broken."""
    x = widened(features)
    norm = x.norm(dim=-1, keepdim=True)
    units = x / norm.clamp_min(torch.finfo(x.dtype).tiny)
    broken = ~norm.isfinite()
    return units.masked_fill_(broken, 0.0), broken.squeeze(-1)


def _distance(cosine: Tensor) -> Tensor:
    """Returns cosine distances; what rounding leaves of 0 is 0."""
    return threshold(1.0 - cosine, 8 * torch.finfo(cosine.dtype).eps, 0.0)


def _matrix(units: Tensor) -> Tensor:
    """Returns all cosines ``[b, N, N]``; one half is computed, the other copied."""
    n = units.shape[1]
    out = units.new_empty(len(units), n, n)
    for i in range(0, n, _BLOCK):
        part = units[:, i : i + _BLOCK] @ units[:, i:].mT
        out[:, i : i + _BLOCK, i:] = part
        out[:, i + _BLOCK :, i : i + _BLOCK] = part[:, :, _BLOCK:].mT
    return out


def _rows_of(units: Tensor, matrix: Tensor | None) -> DistanceTo:
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


def _max_min(first: Tensor, broken: Tensor, distance_to: DistanceTo, k: int) -> Tensor:
    """Farthest-point picks ``[b, k]``, the first where ``first`` ``[b, N]`` is largest."""
    picks = torch.empty(len(first), k, dtype=torch.int64, device=first.device)
    closest = torch.full_like(first, float("inf")).masked_fill_(broken, _BROKEN)
    value = first.masked_fill(broken, _BROKEN)
    for step in range(k):
        pick = value.argmax(1)  # of equal values the first
        picks[:, step] = pick
        value = torch.minimum(closest, distance_to(pick), out=closest)
        closest.scatter_(1, pick[:, None], _TAKEN)
    return picks


def _max_sum(pivot: Tensor, broken: Tensor, distance_to: DistanceTo, k: int) -> Tensor:
    """Picks ``[b, k]``, each with the largest sum of distances to those before; first ``pivot``."""
    picks = torch.empty(len(pivot), k, dtype=torch.int64, device=pivot.device)
    total, pick = None, pivot
    for step in range(k):
        picks[:, step] = pick
        unlike = distance_to(pick).sub_(1.0)  # less a constant, so that sums stay small and exact
        if total is None:
            total = torch.zeros_like(unlike).masked_fill_(broken, _BROKEN)
        total.add_(unlike).scatter_(1, pick[:, None], _TAKEN)
        pick = total.argmax(1)
    return picks


def _dpp(
    relevance: Tensor, gain: Tensor, broken: Tensor, distance_to: DistanceTo, k: int
) -> Tensor:
    """Greedy maximum-determinant picks ``[b, k]`` by an incremental Cholesky factor.

    ``gain`` ``[b, N]``, what each token adds to the determinant, only falls. Once it is nothing
    but rounding for all that are left (more picks than dimensions), the most relevant ones follow.
    """
    b, n = relevance.shape
    picks = torch.empty(b, k, dtype=torch.int64, device=relevance.device)
    factor = relevance.new_zeros(b, k, n)
    floor = (64 * torch.finfo(gain.dtype).eps * gain).clamp_(min=_SMALLEST)
    rest = relevance.masked_fill(broken, _BROKEN)
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


def _select(features: Tensor, given: Tensor | None, k: int, mode: Mode, gram_bytes: int) -> Tensor:
    """Picks within a group of images, from one matrix of cosines or row by row.

    ``given`` is the pivot ``[b]`` or the relevance ``[b, N]`` of the modes that take one.
    """
    units, broken = _units(features)
    n = units.shape[1]
    per_row = n * units.element_size()
    many = mode == "max_min" or k * _ROWS_OF_MATRIX > n
    matrix = _matrix(units) if many and n * per_row <= gram_bytes else None
    distance_to = _rows_of(units, matrix)
    if given is None:
        step = max(1, gram_bytes // max(1, per_row))
        return _max_min(_farthest_from_others(units, matrix, step), broken, distance_to, k)
    if mode == "max_sum":
        return _max_sum(given, broken, distance_to, k)
    relevance = given.to(units.dtype)
    broken = broken | ~relevance.isfinite()
    gain = relevance.square().masked_fill(broken | ~units.any(-1), 0.0)
    return _dpp(relevance.masked_fill(broken, 0.0), gain, broken, distance_to, k)


def _given(
    features: Tensor, mode: Mode, pivot: Tensor | None, relevance: Tensor | None
) -> Tensor | None:
    """Returns what the mode takes besides the features, checked.

    Raises:
        ConfigError: unknown mode, or one of the two missing or not taken.
        InputError: of another shape or dtype, or a pivot out of range.
    """
    if mode not in get_args(Mode):
        known = ", ".join(get_args(Mode))
        raise ConfigError(f"greedy_select: unknown mode {mode!r}; known: {known}.")
    takes = {"pivot": mode == "max_sum", "relevance": mode == "dpp"}
    for name, value in {"pivot": pivot, "relevance": relevance}.items():
        if (value is not None) != takes[name]:
            need = "needs" if takes[name] else "takes no"
            raise ConfigError(f"greedy_select: mode {mode!r} {need} {name}=.")
    b, n = features.shape[:2]
    if relevance is not None and (relevance.shape != (b, n) or not relevance.is_floating_point()):
        raise InputError(
            f"greedy_select: relevance is {list(relevance.shape)} {relevance.dtype}; give floats "
            f"[{b}, {n}]."
        )
    if pivot is None:
        return relevance
    if pivot.shape != (b,) or pivot.dtype != torch.int64:
        raise InputError(
            f"greedy_select: pivot is {list(pivot.shape)} {pivot.dtype}; give int64 [{b}]."
        )
    if bool(((pivot < 0) | (pivot >= n)).any()):
        raise InputError(f"greedy_select: pivots must be from 0 to {n - 1}.")
    return pivot


@torch.no_grad()
def greedy_select(
    features: Tensor,
    k: int,
    mode: Mode = "max_min",
    *,
    pivot: Tensor | None = None,
    relevance: Tensor | None = None,
    gram_bytes: int = 1024 * MIB,
) -> Tensor:
    """Picks ``k`` tokens per row, one after the other.

    ``max_min``: the first is the token with the largest cosine distance to its nearest other
    token; each next one has the largest distance to its nearest picked token.

    ``max_sum``: the first is ``pivot``; each next one has the largest sum of distances to those
    picked.

    ``dpp``: each raises the determinant of ``relevance_i * cosine_ij * relevance_j`` over the
    picked tokens most. Once none raises it by more than rounding, the most relevant ones follow.

    Ties go to the lower index. A zero vector is at distance 1 from all; a token with NaN or inf
    comes last (a pivot comes first in any case).

    Args:
        features: ``[B, N, D]``; 16 bits are computed in float32, float64 stays.
        k: how many, from 0 to N.
        mode: the rule.
        pivot: ``[B]`` int64, for ``max_sum``.
        relevance: ``[B, N]`` float, for ``dpp``, the highest of a row about 1.
        gram_bytes: most bytes of cosines held at a time: above, image by image; where one image
            alone exceeds them, row by row. Few picks are computed row by row anyway.

    Returns:
        ``[B, k]`` int64 in the order of the picks.

    Raises:
        ConfigError: unknown mode, ``k`` or ``gram_bytes`` out of range, an argument that the mode
            does not take or lacks.
        InputError: shapes or dtypes that do not fit.
    """
    check_dims(features, "B, N, D", "greedy_select")
    given = _given(features, mode, pivot, relevance)
    if gram_bytes < 1:
        raise ConfigError(f"greedy_select: gram_bytes={gram_bytes}; give a positive number.")
    n = features.shape[1]
    check_count(k, n, "greedy_select")
    item = widened(features[:0]).element_size()
    group = max(1, gram_bytes // max(1, n * n * item))
    parts = features.split(group)
    taken = [None] * len(parts) if given is None else given.split(group)
    with full_precision(features):
        picks = [_select(x, y, k, mode, gram_bytes) for x, y in zip(parts, taken, strict=True)]
    return torch.cat(picks)
