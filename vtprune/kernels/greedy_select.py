"""Greedy picks that depend on what was picked before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from vtprune.errors import ConfigError
from vtprune.kernels._common import MIB, check_count, check_dims, full_precision, widened

Mode = Literal["max_min"]
_BROKEN = -1.0  # below every distance: a token with NaN or inf is picked after all others


def _units(features: Tensor) -> tuple[Tensor, Tensor]:
    """Returns unit vectors ``[b, N, D]``, zero where there is none, and which tokens are broken."""
    x = widened(features)
    norm = x.norm(dim=-1, keepdim=True)
    units = x / norm.clamp_min(torch.finfo(x.dtype).tiny)
    broken = ~norm.isfinite()
    return units.masked_fill(broken, 0.0), broken.squeeze(-1)


def _distance(a: Tensor, b: Tensor) -> Tensor:
    """Returns cosine distances ``[b, m, N]``; what rounding leaves of 0 is 0."""
    d = torch.matmul(a, b.transpose(1, 2)).neg_().add_(1.0)
    return d.masked_fill_(d < 8 * torch.finfo(d.dtype).eps, 0.0)


def _nearest(distance: Tensor, start: int) -> Tensor:
    """Returns the distance to the nearest other token of rows ``start ..`` of the matrix."""
    distance = distance.clone()
    distance.diagonal(start, 1, 2).fill_(float("inf"))
    return distance.amin(2)


def _first_max(x: Tensor) -> Tensor:
    """Returns the lowest index of the maximum of each row; ``argmax`` promises none on GPUs."""
    order = torch.arange(x.shape[1], device=x.device)
    return torch.where(x == x.amax(1, keepdim=True), order, x.shape[1]).amin(1)


def _max_min(
    nearest: Tensor, broken: Tensor, distance_to: Callable[[Tensor], Tensor], k: int
) -> Tensor:
    """Farthest-point picks ``[b, k]``, the first the token farthest from its nearest other."""
    picks = torch.empty(len(nearest), k, dtype=torch.int64, device=nearest.device)
    taken = torch.zeros_like(broken)
    closest = torch.full_like(nearest, float("inf")).masked_fill_(broken, _BROKEN)
    value = nearest.masked_fill(broken, _BROKEN)
    for step in range(k):
        pick = _first_max(value)
        picks[:, step] = pick
        taken.scatter_(1, pick[:, None], True)
        closest = torch.minimum(closest, distance_to(pick))
        value = closest.masked_fill(taken, float("-inf"))
    return picks


def _select(features: Tensor, k: int, gram_bytes: int) -> Tensor:
    """Picks within a group of images, from one matrix of distances or row by row."""
    units, broken = _units(features)
    rows = torch.arange(len(units), device=units.device)
    n = units.shape[1]
    per_row = n * units.element_size()
    if n * per_row <= gram_bytes:
        distance = _distance(units, units)
        return _max_min(_nearest(distance, 0), broken, lambda pick: distance[rows, pick], k)
    step = max(1, gram_bytes // per_row)
    parts = [_nearest(_distance(units[:, i : i + step], units), i) for i in range(0, n, step)]
    nearest = torch.cat(parts, dim=1)
    return _max_min(
        nearest, broken, lambda pick: _distance(units[rows, pick, None], units)[:, 0], k
    )


@torch.no_grad()
def greedy_select(
    features: Tensor, k: int, mode: Mode = "max_min", *, gram_bytes: int = 1024 * MIB
) -> Tensor:
    """Picks ``k`` tokens per row, one after the other.

    ``max_min``: the first is the token with the largest cosine distance to its nearest other
    token; each next one has the largest distance to its nearest picked token. Ties go to the
    lower index. A zero vector is at distance 1 from all; a token with NaN or inf comes last.

    Args:
        features: ``[B, N, D]``; 16 bits are computed in float32, float64 stays.
        k: how many, from 0 to N.
        mode: the rule.
        gram_bytes: most bytes of distances held at a time: above, image by image; where one image
            alone exceeds them, row by row.

    Returns:
        ``[B, k]`` int64 in the order of the picks.

    Raises:
        ConfigError: unknown mode, ``k`` or ``gram_bytes`` out of range.
        InputError: not a float tensor of three dimensions.
    """
    if mode not in get_args(Mode):
        raise ConfigError(f"greedy_select: unknown mode {mode!r}; known: max_min.")
    if gram_bytes < 1:
        raise ConfigError(f"greedy_select: gram_bytes={gram_bytes}; give a positive number.")
    check_dims(features, "B, N, D", "greedy_select")
    n = features.shape[1]
    check_count(k, n, "greedy_select")
    item = widened(features[:0]).element_size()
    group = max(1, gram_bytes // max(1, n * n * item))
    with full_precision(features):
        return torch.cat([_select(part, k, gram_bytes) for part in features.split(group)])
