"""Information flow through a tower: a running score, and how many tokens a block can spare."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def running(scores: Tensor, decay: float = 0.5) -> Tensor:
    """Returns the exponential moving average of ``[L, B, N]`` over L: ``[B, N]``.

    It begins with the first of them as it is.
    """
    mean = scores[0]
    for score in scores[1:]:
        mean = decay * mean + (1 - decay) * score
    return mean


def concentration(relation: Tensor) -> Tensor:
    """Returns how far attention is from even: 1 less the square of its entropy over log N.

    Args:
        relation: ``[B, N]`` attention of one query to N > 1 tokens; it need not sum to 1, and NaN
            counts as none.

    Returns:
        ``[B]`` float32 from 0 (even) to 1 (all to one token).
    """
    relation = relation.float().nan_to_num(0.0)
    share = relation / relation.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    entropy = -torch.xlogy(share, share).sum(1) / math.log(relation.shape[1])
    return (1 - entropy.square()).clamp(0, 1)


def n_leaving(relation: Tensor, target: Tensor, ahead: int) -> Tensor:
    """Returns how many of N tokens leave now, if ``target`` are to be left in the end.

    All that are too many at the last stage, and before it a share of them: the more, the nearer
    the end and the more concentrated attention is.

    Args:
        relation: ``[B, N]`` attention of one query.
        target: ``[B]`` tokens left after the last stage, at most N.
        ahead: blocks from this stage to the last one.

    Returns:
        ``[B]`` float32, not rounded.
    """
    excess = relation.shape[1] - target.to(relation.device, torch.float32)
    if not ahead or relation.shape[1] == 1:
        return excess
    return (excess / math.sqrt(ahead) * concentration(relation)).minimum(excess)


def largest(amount: Tensor, group: Tensor | None) -> Tensor:
    """Returns for each of ``[B]`` the largest of its group; every row is one where it is None."""
    if group is None:
        return amount
    same = group[:, None] == group[None]
    return amount[None].expand_as(same).masked_fill(~same, -math.inf).amax(1)
