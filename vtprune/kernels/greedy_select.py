"""Greedy picks that depend on what was picked before."""

from __future__ import annotations

import math
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor

from vtprune.errors import ConfigError, InputError
from vtprune.kernels._common import MIB, check_count, check_dims, full_precision, widened
from vtprune.kernels._dispatch import launch, run
from vtprune.kernels._greedy import matrix_of, picks_of, start, units_of

Mode = Literal["max_min", "max_sum", "mmr", "dpp"]
_ROWS_OF_MATRIX = 16  # the whole matrix costs about as much as N / 16 rows, one by one
_FACTOR_BYTES = 100_000_000  # of a Cholesky factor, as often as one program reads it


@torch.no_grad()
def greedy_select(
    features: Tensor,
    k: int,
    mode: Mode = "max_min",
    *,
    pivot: Tensor | None = None,
    relevance: Tensor | None = None,
    weight: float = 0.3,
    gram_bytes: int = 1024 * MIB,
) -> Tensor:
    """Picks ``k`` tokens per row, one after the other.

    ``max_min``: the first is the token with the largest cosine distance to its nearest other
    token; each next one has the largest distance to its nearest picked token.

    ``max_sum``: the first is ``pivot``; each next one has the largest sum of distances to those
    picked.

    ``mmr``: the first has the highest relevance; each next one the highest relevance less
    ``weight`` times the cosine to the picked token most like it (Maximal Marginal Relevance,
    Carbonell and Goldstein 1998). The relevance of a row is scaled to 0 .. 1 before.

    ``dpp``: each raises the determinant of ``relevance_i * cosine_ij * relevance_j`` over the
    picked tokens most. Once none raises it by more than rounding, the most relevant ones follow.

    Ties go to the lower index. A zero vector is at distance 1 from all; a token with NaN or inf
    comes last (a pivot comes first in any case).

    Args:
        features: ``[B, N, D]``; 16 bits are computed in float32, float64 stays.
        k: how many, from 0 to N.
        mode: the rule.
        pivot: ``[B]`` int64, for ``max_sum``. On GPUs and in graphs, where a look at it would wait
            for the device, one out of range is taken as the nearest in range.
        relevance: ``[B, N]`` float, for ``mmr``, and for ``dpp``, there the highest of a row
            about 1.
        weight: of unlikeness in ``mmr``; at 0 it picks the tokens of highest relevance.
        gram_bytes: most bytes of cosines held at a time: above, image by image; where one image
            alone exceeds them, row by row, and on CPUs where the picks are few. What is computed
            row by row has no kernel.

    Returns:
        ``[B, k]`` int64 in the order of the picks.

    Raises:
        ConfigError: unknown mode, ``k``, ``weight`` or ``gram_bytes`` out of range, an argument
            that the mode does not take or lacks.
        InputError: shapes or dtypes that do not fit.
    """
    check_dims(features, "B, N, D", "greedy_select")
    given = _given(features, mode, pivot, relevance)
    if gram_bytes < 1:
        raise ConfigError(f"greedy_select: gram_bytes={gram_bytes}; give a positive number.")
    if not (math.isfinite(weight) and weight >= 0):
        raise ConfigError(f"greedy_select: weight={weight}; give a finite number, 0 or more.")
    b, n = features.shape[:2]
    check_count(k, n, "greedy_select")
    if not k:
        return torch.empty(b, 0, dtype=torch.int64, device=features.device)
    item = widened(features[:0]).element_size()
    group = max(1, gram_bytes // (n * n * item))
    parts = features.split(group)
    taken = [None] * len(parts) if given is None else given.split(group)
    with full_precision(features):
        picks = [
            _select(x, y, k, mode, weight, gram_bytes) for x, y in zip(parts, taken, strict=True)
        ]
    return torch.cat(picks)


def _select(
    features: Tensor, given: Tensor | None, k: int, mode: Mode, weight: float, gram_bytes: int
) -> Tensor:
    """Picks within a group of images, from one matrix of cosines or row by row.

    ``given`` is the pivot ``[b]`` or the relevance ``[b, N]`` of the modes that take one.
    """
    units, broken = units_of(features)
    refused = _by_rows(units, k, mode, gram_bytes)
    matrix = matrix_of(units) if refused is None else None
    if units.dtype == torch.float64:
        refused = "features are float64, which it would round"
    elif mode == "dpp" and k * k * units.shape[1] * 2 > _FACTOR_BYTES:
        refused = f"a factor of {k} picks among {units.shape[1]} tokens is too large for it"
    began = start(units, broken, given, matrix, mode, weight, gram_bytes)
    reference = partial(picks_of, units)
    return run("greedy_select", reference, _kernel, refused, *began, matrix, k, mode, weight)


def _by_rows(units: Tensor, k: int, mode: Mode, gram_bytes: int) -> str | None:
    """Returns why cosines are computed row by row; None = all at once."""
    n = units.shape[1]
    if n * n * units.element_size() > gram_bytes:
        return f"the cosines of {n} tokens take more than gram_bytes={gram_bytes}"
    few = k * _ROWS_OF_MATRIX <= n and units.device.type == "cpu"  # elsewhere launches cost more
    if mode != "max_min" and few:
        return f"{k} picks among {n} tokens need too few cosines for a matrix of all"
    return None


@torch.library.custom_op("vtprune::greedy_select", mutates_args=())
def _kernel(
    value: Tensor,
    first: Tensor | None,
    relevance: Tensor | None,
    cosines: Tensor,
    k: int,
    mode: str,
    weight: float,
) -> Tensor:
    return launch("greedy_select", value, first, relevance, cosines, k, mode, weight)


@_kernel.register_fake
def _(
    value: Tensor,
    first: Tensor | None,
    relevance: Tensor | None,
    cosines: Tensor,
    k: int,
    mode: str,
    weight: float,
) -> Tensor:
    return value.new_empty((len(value), k), dtype=torch.int64)


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
    takes = {"pivot": mode == "max_sum", "relevance": mode in ("mmr", "dpp")}
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
    seen = pivot.device.type == "cpu" and not torch.compiler.is_compiling()
    if seen and bool(((pivot < 0) | (pivot >= n)).any()):
        raise InputError(f"greedy_select: pivots must be from 0 to {n - 1}.")
    return pivot.clamp(0, max(0, n - 1))
