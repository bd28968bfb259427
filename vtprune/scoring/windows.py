"""Windows of a grid of tokens, and the best of each."""

from __future__ import annotations

import torch
from torch import Tensor

from vtprune.errors import InputError
from vtprune.kernels.topk_sorted import ranked


def windows(n: int, grid: tuple[int, int, int] | None, side: int) -> Tensor:
    """Returns the window that each token is in, ``[n]`` int64 from 0 without gaps.

    Windows are squares of ``side`` in each frame; rows and columns that fill none are of the last
    one before them. Without a grid all tokens are of one window.

    Raises:
        InputError: a grid ``(t, h, w)`` that does not hold ``n`` tokens.
    """
    if grid is None:
        return torch.zeros(n, dtype=torch.int64)
    frames, height, width = grid
    if frames * height * width != n:
        raise InputError(f"grid={grid} holds {frames * height * width} tokens, but there are {n}.")
    down, across = max(1, height // side), max(1, width // side)
    y = (torch.arange(height) // side).clamp(max=down - 1)
    x = (torch.arange(width) // side).clamp(max=across - 1)
    frame = torch.arange(frames)[:, None, None] * down
    return ((frame + y[:, None]) * across + x).flatten()


def best_of_each(score: Tensor, group: Tensor, limit: int, most: int) -> Tensor:
    """Marks the best tokens, by falling score, as long as their group has fewer than ``limit``.

    Args:
        score: ``[B, N]``, NaN the lowest, ties to the lower index.
        group: ``[N]`` int64 from 0.
        most: how many in all.

    Returns:
        ``[B, N]`` bool.
    """
    order = ranked(score)
    by_group, turn = group[order].sort(dim=1, stable=True)
    first = torch.searchsorted(by_group, by_group)
    place = torch.arange(score.shape[1], device=score.device) - first
    fits = torch.zeros_like(order, dtype=torch.bool).scatter(1, turn, place < limit)
    taken = fits & (fits.long().cumsum(1) <= most)
    return torch.zeros_like(taken).scatter(1, order, taken)
