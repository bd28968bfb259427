"""Dominant tokens that stay as they are, and a few that the rest is merged into."""

from __future__ import annotations

import torch
from torch import Tensor

from vtprune.kernels.gather_tokens import gather_tokens
from vtprune.kernels.topk_sorted import topk_sorted
from vtprune.scoring.diversity import nearest, outside
from vtprune.selection import Mix, Selection


def merge_rest(
    score: Tensor,
    keys: Tensor,
    n_top: int,
    n_merged: int,
    *,
    has_cls: bool = False,
    mean: bool = False,
) -> Selection:
    """Keeps the highest scores and merges the rest into evenly spaced tokens of it.

    Each of the others goes to the one with the most similar keys, which their mean is added to;
    with ``mean`` they are averaged with it.

    Args:
        score: ``[B, N]``; keys: ``[B, N, d]``.
        n_top: kept as they are; n_merged: made of the rest, at most as many as it has.
        has_cls: whether source N comes first, as a token of its own.

    Returns:
        The selection of [CLS] if asked for, dominant tokens ascending, merged tokens ascending.
    """
    top = topk_sorted(score, n_top)  # [B, n_top]
    rest = outside(top, score.shape[1])  # [B, M]
    n_merged = min(n_merged, rest.shape[1])
    step = max(1, rest.shape[1] // max(1, n_merged))
    is_target = torch.zeros(rest.shape[1], dtype=torch.bool, device=rest.device)
    is_target[::step][:n_merged] = True
    targets, others = rest[:, is_target], rest[:, ~is_target]
    owner = nearest(*gather_tokens(others, keys), *gather_tokens(targets, keys))
    if not n_merged:
        others, owner = others[:, :0], owner[:, :0]
    new = top.new_full((len(top), int(has_cls)), -1)
    rows = torch.cat([new, top, targets], dim=1)
    mix = _mix(rows, others, rows.shape[1] - n_merged, owner, score.shape[1], mean)
    return Selection(rows, score.shape[1], mix)


def _mix(rows: Tensor, others: Tensor, first: int, owner: Tensor, n: int, mean: bool) -> Mix:
    """Makes outputs from ``first`` on of others too; ``owner`` ``[B, M]`` counts from there."""
    count = torch.zeros(rows.shape, device=rows.device)
    count.scatter_add_(1, first + owner, torch.ones(owner.shape, device=rows.device))
    own = 1 / (1 + count) if mean else torch.ones_like(count)
    share = own if mean else 1 / count.clamp(min=1)
    itself = torch.arange(rows.shape[1], device=rows.device).expand_as(rows)
    return Mix(
        torch.cat([torch.where(rows < 0, n, rows), others], dim=1),
        torch.cat([itself, first + owner], dim=1),
        torch.cat([own, share.gather(1, first + owner)], dim=1),
    )
