"""Picks in tiers: what is claimed first, then by score; and claims of the best and around them."""

from __future__ import annotations

import torch
from torch import Tensor

from vtprune.errors import InputError
from vtprune.kernels.topk_sorted import ranked


def take(claim: Tensor, score: Tensor, k: int) -> Tensor:
    """Returns the ``k`` tokens of lowest claim; of equal claims those of highest score.

    Args:
        claim: ``[B, N]`` int64; score: ``[B, N]`` float. NaN comes last within a claim.

    Returns:
        ``[B, k]`` int64, ascending.
    """
    order = ranked(score)
    by_claim = claim.gather(1, order).sort(dim=1, stable=True).indices
    return order.gather(1, by_claim[:, :k]).sort(dim=1).values


def claims(
    score: Tensor, n_anchors: int, grid: tuple[int, int, int] | None, *, wrap: bool = False
) -> Tensor:
    """Ranks the best tokens, then their neighbours in the order of the anchors.

    Args:
        score: ``[B, N]``; n_anchors: how many of the best; grid, wrap: see ``neighbours``.

    Returns:
        ``[B, N]`` int64: the lower the earlier, the same for all tokens that nothing claims.
    """
    batch, n = score.shape
    anchors = ranked(score)[:, :n_anchors]  # [B, A]
    around = neighbours(anchors, n, grid, wrap=wrap).flatten(1)  # [B, 4 A]
    listed = torch.cat([anchors, around], dim=1)
    claim = listed.new_full((batch, n + 1), listed.shape[1])
    turn = torch.arange(listed.shape[1], device=score.device).expand_as(listed)
    return claim.scatter_reduce(1, listed, turn, "amin")[:, :n]


def neighbours(
    index: Tensor, n: int, grid: tuple[int, int, int] | None, *, wrap: bool = False
) -> Tensor:
    """Returns the tokens left, right, above and below, ``[..., 4]`` int64; ``n`` where none is.

    Args:
        index: ``[...]`` int64 positions in a raster of ``grid`` ``(t, h, w)``. Frames do not
            touch, and without a grid nothing does.
        wrap: instead step in the flat sequence: rows run into each other, both ends repeat.

    Raises:
        InputError: a grid that does not hold ``n`` tokens.
    """
    if grid is None:
        return index.new_full((*index.shape, 4), n)
    frames, height, width = grid
    if frames * height * width != n:
        raise InputError(f"grid={grid} holds {frames * height * width} tokens, but there are {n}.")
    around = index[..., None] + index.new_tensor([-1, 1, -width, width])
    if wrap:
        return around.clamp(0, n - 1)
    x, y = index % width, index // width % height
    there = torch.stack([x > 0, x < width - 1, y > 0, y < height - 1], dim=-1)
    return torch.where(there, around, n)
