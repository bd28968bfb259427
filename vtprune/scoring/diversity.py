"""Distances and complements between sets of tokens."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize


def outside(index: Tensor, n: int) -> Tensor:
    """Returns the positions of ``0..n-1`` that are not in ``index``, ascending.

    Args:
        index: ``[B, K]`` int64, distinct within a row.

    Returns:
        ``[B, n - K]`` int64.
    """
    taken = torch.zeros(len(index), n, dtype=torch.bool, device=index.device)
    taken.scatter_(1, index, True)
    return taken.to(torch.uint8).argsort(dim=1, stable=True)[:, : n - index.shape[1]]


def nearest(tokens: Tensor, anchors: Tensor) -> Tensor:
    """Returns the anchor of highest cosine similarity for each token, ties to the lower index.

    Args:
        tokens: ``[B, M, D]``; anchors: ``[B, T, D]``. Zero vectors are similar to nothing.

    Returns:
        ``[B, M]`` int64; zeros when there is no anchor.
    """
    if not anchors.shape[1]:
        return torch.zeros(tokens.shape[:2], dtype=torch.int64, device=tokens.device)
    cosine = normalize(tokens.float(), dim=-1) @ normalize(anchors.float(), dim=-1).mT
    best = cosine == cosine.max(-1, keepdim=True).values
    return best.to(torch.uint8).argmax(-1)
