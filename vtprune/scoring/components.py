"""Connected components of tokens that are alike: within frames, then over a whole video.

T frames, N tokens per frame, D width, M components within frames.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vtprune.kernels.topk_sorted import ranked

STEPS = 24  # halvings of the interval of thresholds, to less than float32 can tell cosines apart


@dataclass(frozen=True)
class Components:
    """What tokens are put together.

    Attributes:
        of: ``[T * N]`` int64, the component of each token, 0 to K - 1, in the order of ``rows``.
        rows: ``[K]`` int64, ascending: of each component the token that is like most others.
        weight: ``[T * N]`` float32, what each token counts in the mean of its component: the mean
            of means of the components within frames.
    """

    of: Tensor
    rows: Tensor
    weight: Tensor


def labels_of(linked: Tensor) -> Tensor:
    """Returns the lowest index that each node is connected with, ``[..., n]`` int64.

    Args:
        linked: ``[..., n, n]`` bool, symmetric.
    """
    n = linked.shape[-1]
    own = torch.arange(n, device=linked.device)
    linked = linked | (own[:, None] == own)
    labels = own.expand(linked.shape[:-1])
    while True:
        lowest = torch.where(linked, labels[..., None, :], n).amin(-1)
        lowest = lowest.gather(-1, lowest)
        if torch.equal(lowest, labels):
            return labels
        labels = lowest


def components(x: Tensor, tau: float, k: int | None = None) -> Components:
    """Joins tokens of a frame whose cosine exceeds ``tau``, then such means of those.

    Args:
        x: ``[T, N, D]`` float32; tau: from -1 to 1.
        k: that so many are left, not more than ``tau`` leaves within frames: the means join by
            their strongest links until they are, in place of those above ``tau``.
    """
    frames, n, _ = x.shape
    units = F.normalize(x, dim=-1)
    alike = units @ units.mT
    first = labels_of(alike > tau) + torch.arange(frames, device=x.device)[:, None] * n
    degree = (alike > tau).sum(-1).flatten()
    names, inner = first.flatten().unique(return_inverse=True)
    means, sizes = _means(x.flatten(0, 1), inner, len(names))
    units = F.normalize(means, dim=-1)
    alike = units @ units.mT
    outer = labels_of(alike > tau) if k is None else linked_to(alike, k)
    _, outer = outer.unique(return_inverse=True)
    members = torch.bincount(outer)
    of = outer[inner]
    rows = _most_linked(of, degree, len(members))
    order = rows.argsort()
    weight = 1 / (members[of] * sizes[inner]).float()
    return Components(order.argsort()[of], rows[order], weight)


def fitting(x: Tensor, k: int) -> Components:
    """Returns ``k`` components, by the lowest threshold that leaves so many of both kinds."""

    def enough(tau: float) -> bool:
        return len(components(x, tau).rows) >= k

    return components(x, _lowest(enough), k)


def _lowest(enough: Callable[[float], bool]) -> float:
    """Returns the lowest threshold at which it is enough, as if that did not depend on luck."""
    low, high = -1.0, 1.0 + 1e-5  # above every cosine, where nothing joins
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _means(x: Tensor, group: Tensor, n: int) -> tuple[Tensor, Tensor]:
    sizes = torch.bincount(group, minlength=n)
    sums = torch.zeros(n, x.shape[1], device=x.device).index_add_(0, group, x)
    return sums / sizes[:, None], sizes


def linked_to(alike: Tensor, k: int) -> Tensor:
    """Joins nodes by their strongest links until ``k`` components are left; returns labels ``[n]``.

    These are what the strongest edges of the maximum spanning tree join (single linkage).

    Args:
        alike: ``[n, n]``, symmetric.
    """
    n = len(alike)
    best, parent = alike[0].clone(), torch.zeros(n, dtype=torch.int64, device=alike.device)
    strength = torch.full((n,), torch.inf, device=alike.device)
    outside = torch.ones(n, dtype=torch.bool, device=alike.device)
    outside[0] = False
    for _ in range(n - 1):
        new = best.masked_fill(~outside, -torch.inf).argmax()
        strength[new], outside[new] = best[new], False
        nearer = outside & (alike[new] > best)
        best, parent = torch.where(nearer, alike[new], best), torch.where(nearer, new, parent)
    roots = ranked(-strength[None])[0, : k - 1]  # their links are the weakest
    parent[roots] = roots
    while not torch.equal(parent, parent[parent]):
        parent = parent[parent]
    return parent


def _most_linked(of: Tensor, degree: Tensor, n: int) -> Tensor:
    """Returns of each of ``n`` components the token of highest degree, ties to the lower index."""
    size = len(of)
    rank = degree * size + (size - 1 - torch.arange(size, device=of.device))
    best = torch.full((n,), -1, device=of.device).scatter_reduce_(0, of, rank, "amax")
    return size - 1 - best % size
