"""Tokens of videos frame by frame: what changed, what is typical, and budgets of frames.

B videos, T frames, N tokens per frame, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vtprune.kernels.row_pair_stats import cosine, row_pair_stats
from vtprune.kernels.topk_sorted import ranked
from vtprune.scoring.hierarchy import take
from vtprune.signals import Signals

WIDTHS = tuple(2.0**power for power in range(-3, 2))  # of the Gaussians


def framed(signals: Signals) -> Tensor:
    """Returns the tokens ``[B, T, N, D]`` in float32; one frame where they have no grid.

    A token that is not finite is zeros.
    """
    frames = 1 if signals.grid is None else signals.grid[0]
    tokens = signals.tokens.float().unflatten(1, (frames, -1))
    return tokens.masked_fill(~tokens.isfinite().all(-1, keepdim=True), 0.0)


def broken(signals: Signals) -> Tensor:
    """Marks the tokens that are not finite, ``[B, T * N]`` bool."""
    return ~signals.tokens.isfinite().all(-1)


def changes(frames: Tensor, before: Tensor) -> Tensor:
    """Returns 1 - the cosine of each token with that at its place ``before``, ``[..., N]``.

    Args:
        frames, before: ``[..., N, D]``.
    """
    return 1 - cosine(*row_pair_stats(frames, before))


def steady_channels(frames: Tensor) -> Tensor:
    """Returns the half of the channels that vary least over a video, ``[B, D // 2]`` ascending."""
    spread = frames.flatten(1, 2).var(dim=1, correction=0)
    return ranked(-spread)[:, : frames.shape[-1] // 2].sort(dim=1).values


def typicality(tokens: Tensor, center: Tensor) -> Tensor:
    """Returns a sum of Gaussians of the distance to a center, the higher the nearer, ``[..., N]``.

    Args:
        tokens: ``[..., N, D]``; center: ``[..., 1, D]``.
    """
    squared = (tokens - center).square().sum(-1)
    return torch.stack([torch.exp(-squared / (2 * width)) for width in WIDTHS]).sum(0)


def uniqueness(typical: Tensor, share: float, sharpness: float) -> Tensor:
    """Returns what share of each frame is to stay, more where a frame is less typical, ``[B, T]``.

    Args:
        typical: ``[B, T, N]`` of tokens in their video; share: of the video.
    """
    weights = (-typical.mean(-1) / sharpness).softmax(-1)
    return (share * (1 + weights - weights.mean(-1, keepdim=True))).clamp(max=1.0)


def curvature(frames: Tensor) -> Tensor:
    """Returns how sharply the path of frame means turns at each frame, ``[B, T]``; 1 at both ends.

    Between 0, straight on, and 2, back.
    """
    steps = F.normalize(frames.mean(2), dim=-1).diff(dim=1)  # [B, T - 1, D]
    turns = 1 - F.cosine_similarity(steps[:, :-1], steps[:, 1:], dim=-1)
    return F.pad(turns, (1, 1), value=1.0)[:, : frames.shape[1]]


def rounded(exact: Tensor, k: int, most: int | Tensor, *, greedy: bool = False) -> Tensor:
    """Returns whole budgets of frames that sum to ``k``, by largest remainder, ``[B, T]`` int64.

    Args:
        exact: ``[B, T]`` of at least 0, summing to at most ``k``; most: what all frames have
            together at least ``k`` of, of each or ``[B, T]``.
        greedy: the frame of the largest remainder gets all that is left over, then the next.
    """
    given = exact.floor().long().minimum(torch.as_tensor(most, device=exact.device))
    first = ranked(exact - exact.floor()).argsort(dim=1)  # 0 = the largest remainder
    while bool(((left := k - given.sum(1, keepdim=True)) > 0).any()):
        room = most - given
        turn = first.masked_fill(room == 0, exact.shape[1]).argsort(dim=1, stable=True).argsort(1)
        take_all = torch.where(turn == 0, torch.minimum(left, room), 0)
        given = given + (take_all if greedy else ((turn < left) & (room > 0)).long())
    return given


def capped(weights: Tensor, k: int, most: int) -> Tensor:
    """Returns budgets of frames in proportion to ``weights``, none above ``most``, ``[B, T]``.

    What a frame cannot take goes to the others, in proportion; where all others weigh nothing it is
    left over, and without any weight all frames are alike.

    Args:
        weights: ``[B, T]`` of at least 0; k: what a video has.
    """
    weights = weights.double()
    weights = torch.where(weights.sum(1, keepdim=True) > 0, weights, 1.0)
    full = torch.zeros_like(weights, dtype=torch.bool)
    while True:
        free = weights.masked_fill(full, 0.0)
        rest = (k - most * full.sum(1, keepdim=True)).clamp(min=0)
        exact = rest * free / free.sum(1, keepdim=True).clamp(min=torch.finfo(free.dtype).tiny)
        over = (exact > most) & ~full
        if not bool(over.any()):
            return torch.where(full, float(most), exact)
        full |= over


def evenly(rooms: Sequence[int], k: int) -> list[int]:
    """Shares ``k`` evenly among what has room, the earlier first; no more than there is."""
    most = torch.tensor([rooms])
    has = most > 0
    return rounded(has * (k / max(1, int(has.sum()))), k, most)[0].tolist()


def in_proportion(sizes: Sequence[int], k: int) -> list[int]:
    """Shares ``k`` in proportion to ``sizes``, of which none gets more, by largest remainder."""
    most = torch.tensor([sizes])
    return rounded(most.double() * k / max(1, int(most.sum())), k, most)[0].tolist()


def best_of_frames(score: Tensor, budgets: Tensor, bad: Tensor, k: int) -> Tensor:
    """Returns the best of each frame, then of the rest, or the best of those: ``[B, k]`` ascending.

    Args:
        score: ``[B, T, N]``, higher is kept; budgets: ``[B, T]``, which may miss ``k``.
        bad: ``[B, T * N]`` bool, tokens that come last.
    """
    score = score.masked_fill(bad.view_as(score), -torch.inf)
    place = ranked(score.flatten(0, 1)).argsort(dim=1).view_as(score)
    beyond = (place >= budgets[..., None]).flatten(1).long() + 2 * bad.long()
    return take(beyond, score.flatten(1), k)
