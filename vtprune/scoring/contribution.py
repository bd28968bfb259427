"""How much a part of a model contributes: what it changes, what it looks at."""

from __future__ import annotations

import torch
from torch import Tensor


def contribution(changed: Tensor, whole: Tensor) -> Tensor:
    """Returns by how much a change moves what is predicted, ``[B]`` float32, in nats.

    The Kullback-Leibler divergence of the ``changed`` from the ``whole`` model's probabilities;
    both are logits ``[B, V]``.
    """
    log_changed, log_whole = (x.float().log_softmax(-1) for x in (changed, whole))
    return (log_changed.exp() * (log_changed - log_whole)).sum(-1).clamp(min=0)


def order_of(contributions: Tensor) -> list[int]:
    """Returns the indices of ``contributions`` ``[L]``, the least first, ties in order."""
    return contributions.argsort(stable=True).tolist()


def visual_share(rows: Tensor, visual: Tensor) -> Tensor:
    """Returns how much more each head attends to visual tokens than to others, ``[B, H]``.

    Args:
        rows: ``[B, H, n]`` attention of one query, or a sum over several.
        visual: ``[B, n]`` bool.
    """
    seen = (rows.float() * visual[:, None]).sum(-1)
    rest = (rows.float() * ~visual[:, None]).sum(-1)
    return seen / rest.clamp(min=torch.finfo(torch.float32).tiny)


def heads_that_look(
    shares: Tensor, alpha: float, votes: float = 0.4, first: int = 2
) -> tuple[tuple[int, ...], ...]:
    """Returns per layer the heads in which visual tokens matter for most samples.

    Args:
        shares: ``[S, L, H]`` of each sample, layer and head, as ``visual_share`` gives them.
        alpha: above it a sample votes for a head.
        votes: above this share of the samples a head stays.
        first: so many first layers keep all heads.
    """
    keeps = (shares > alpha).float().mean(0) > votes  # [L, H]
    keeps[:first] = True
    return tuple(tuple(row.nonzero()[:, 0].tolist()) for row in keeps)
