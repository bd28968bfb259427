"""Tokens that are merged into any other, by what a token that guides the merge thinks of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from vtprune.kernels._common import full_precision
from vtprune.kernels.topk_sorted import topk_sorted
from vtprune.scoring.diversity import ONE, outside, unit
from vtprune.scoring.matching import goes_into
from vtprune.selection import Mix, Selection


@dataclass(frozen=True)
class Merge:
    """What each of N tokens goes into, and by which factor.

    Attributes:
        rows: ``[B, K]`` int64, the token whose place each output takes.
        into: ``[B, N]`` int64, the output that each token goes into.
        weight: ``[B, N]`` float32.
    """

    rows: Tensor
    into: Tensor
    weight: Tensor

    def then(self, other: Merge) -> Merge:
        """Returns what ``other`` makes of the outputs."""
        return Merge(
            self.rows.gather(1, other.rows),
            other.into.gather(1, self.into),
            self.weight * other.weight.gather(1, self.into),
        )

    def selection(self) -> Selection:
        """Returns the same as a selection."""
        source = torch.arange(self.into.shape[1], device=self.into.device).expand_as(self.into)
        return Selection(self.rows, self.into.shape[1], Mix(source, self.into, self.weight))


def pairs(metric: Tensor, importance: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns ``r`` tokens that others make up for, and for each the most similar that is left.

    A token is made up for by its most similar one of those less redundant than itself, where
    redundant is what resembles any other; so the most redundant ones never leave together. Those
    leave whose likeness to it is high, and whose importance is low. Of equal ones the lower indices
    stay, but which of two that resemble each other most is more redundant is
    ``redundancy_rank``'s.

    Args:
        metric: ``[B, N, D]``, compared by its cosine; tokens with NaN or inf resemble none.
        importance: ``[B, N]``, NaN counts as 0; r: up to N // 2.

    Returns:
        The tokens that stay, ``[B, N - r]``, those that leave, ``[B, r]``, both ascending, and the
        partners of the latter, ``[B, r]``; int64.
    """
    x, broken = unit(metric)
    n = x.shape[1]
    with full_precision(x):
        alike = x @ x.mT
    alike = torch.maximum(alike, alike.mT)  # rounding shall not tell the two of a pair apart
    alike = alike.masked_fill(alike > ONE, 1.0)
    itself = torch.eye(n, dtype=torch.bool, device=x.device)
    alike = alike.masked_fill(itself | broken[:, None] | broken[..., None], -torch.inf)
    rank = redundancy_rank(alike.amax(-1))
    earlier = rank[:, None] <= rank[..., None]  # the column is no less redundant than the row
    least = torch.finfo(alike.dtype).min
    made_up = alike.masked_fill(earlier, -torch.inf).amax(-1).clamp(min=least)
    stays = topk_sorted(importance.float().nan_to_num(0.0, 0.0, 0.0) - made_up, n - r)
    leaves = outside(stays, n)
    from_leaving = alike.gather(1, leaves[..., None].expand(-1, -1, n))
    chosen = from_leaving.gather(2, stays[:, None].expand(-1, r, -1)).max(-1).indices
    return stays, leaves, stays.gather(1, chosen)


def redundancy_rank(highest: Tensor) -> Tensor:
    """Returns distinct ranks of tokens by their highest likeness ``[B, N]``, the highest first.

    Two tokens that resemble each other most are equally redundant, so equals are the rule here. The
    official code leaves their order to ``argsort``, in a sequence of [CLS], patches and guide; what
    it decides is the same only if that is done here, too.

    Returns:
        ``[B, N]`` int64.
    """
    order = pad(highest, (1, 1), value=-torch.inf).argsort(dim=1, descending=True)
    return order.argsort(dim=1)[:, 1:-1]


def guided(
    stays: Tensor, leaves: Tensor, partner: Tensor, importance: Tensor, size: Tensor
) -> Merge:
    """Merges pairs, each by how important both are: by the softmax of the two.

    A sum of what tokens stand for, in which the two of a pair count twice their share, by the size
    of all; so pairs of equal importance become a mean weighted by size.

    Args:
        stays, leaves, partner: as ``pairs`` returns them.
        importance: ``[B, N]``; size: ``[B, N]`` float32, above 0.
    """
    n = size.shape[1]
    worth = importance.double().nan_to_num(0.0, 0.0, 0.0)
    share = (worth.gather(1, leaves) - worth.gather(1, partner)).sigmoid().float()  # of what leaves
    factor = torch.ones_like(size).scatter(1, leaves, 2 * share)
    factor = factor.scatter_add(1, partner, 1 - 2 * share)
    into = goes_into(stays, leaves, partner, n)
    total = torch.zeros_like(size[:, : stays.shape[1]]).scatter_add(1, into, size)
    return Merge(stays, into, factor * size / total.gather(1, into))


def merge_guided(metric: Tensor, importance: Tensor, size: Tensor, k: int) -> Merge:
    """Merges pairs until ``k`` tokens are left, from 1 to N - 1.

    Where more than half are to leave, what is left is paired again: by the mean of its metric,
    weighted by size, and by the importance of the tokens that were merged into.
    """
    batch, n = size.shape
    order = torch.arange(n, device=size.device).expand(batch, n)
    whole = Merge(order, order, torch.ones_like(size))
    metric, importance = metric.float(), importance.float()
    while (n := metric.shape[1]) > k:
        stays, leaves, partner = pairs(metric, importance, min(n - k, n // 2))
        step = guided(stays, leaves, partner, importance, size)
        whole = whole.then(step)
        total = step.selection().total(size)
        mean = Merge(step.rows, step.into, size / total.gather(1, step.into)).selection()
        metric, size = mean.apply(metric), total
        importance = importance.gather(1, step.rows)
    return whole
