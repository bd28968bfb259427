"""Places of a video at which nothing moves, segments of frames by them, and merging around centres.

T frames, N tokens per frame, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vtprune.kernels.topk_sorted import ranked
from vtprune.scoring.clustering import density_peaks
from vtprune.selection import Mix, Selection

Span = tuple[int, int]  # first frame, and the one after the last


def still_runs(still: Tensor) -> Tensor:
    """Returns since how many frames a place has not changed at each, ``[T, N]`` int64.

    Args:
        still: ``[T - 1, N]`` bool, whether a token is as in the frame before.
    """
    runs = [torch.zeros(still.shape[1], dtype=torch.int64)]
    for same in still.cpu():
        runs.append((runs[-1] + 1) * same)
    return torch.stack(runs)


def segments(runs: Tensor, window: int) -> tuple[list[Span], int]:
    """Cuts a video so that most tokens are redundant: those of places still all over a segment.

    Of equally good ways the shortest segments, from the end on.

    Args:
        runs: see ``still_runs``; window: the longest segment.

    Returns:
        The segments, in order, and how many tokens are redundant.
    """
    best, length = [0], [0]  # of the first i frames; of the segment that ends there
    for end in range(1, len(runs) + 1):
        best.append(best[-1])
        length.append(1)
        still = torch.bincount(runs[end - 1]).flip(0).cumsum(0).flip(0).tolist()
        for frames in range(2, min(end, window, len(still)) + 1):
            gain = best[end - frames] + (frames - 1) * still[frames - 1]
            if gain > best[end]:
                best[end], length[end] = gain, frames
    spans, end = [], len(runs)
    while end:
        spans.append((end - length[end], end))
        end -= length[end]
    return spans[::-1], best[-1]


def still_places(spans: Sequence[Span], runs: Tensor) -> Tensor:
    """Marks the places that stand still all over a segment of several frames, ``[S, N]`` bool."""
    found = [(runs[end - 1] >= end - first - 1) & (end - first > 1) for first, end in spans]
    return torch.stack(found)


def most_changed(spans: Sequence[Span], changed: Tensor) -> Tensor:
    """Returns the most that a place changes between frames of each segment, ``[S, N]``.

    Args:
        changed: ``[T - 1, N]``, how much each token does.
    """
    padded = torch.cat([changed, changed.new_full((1, changed.shape[1]), -torch.inf)])
    return torch.stack([padded[first : max(end - 1, first + 1)].amax(0) for first, end in spans])


def loosened(spans: Sequence[Span], still: Tensor, moved: Tensor, k: int) -> Tensor:
    """Returns ``still`` without the places that move most, until it leaves ``k`` tokens or more.

    Args:
        still: ``[S, N]`` bool; moved: ``[S, N]``, how much each place does.
    """
    frames = torch.tensor([end - first for first, end in spans])[:, None]
    lacking = k - int((frames - (frames - 1) * still).sum())
    if lacking <= 0:
        return still
    order = ranked(moved.masked_fill(~still, -torch.inf).flatten()[None])[0]
    gained = (frames - 1).expand_as(still).flatten()[order].cumsum(0)
    loose = order[: int((gained < lacking).sum()) + 1]
    return still.flatten().index_fill(0, loose, False).view_as(still)


@dataclass(frozen=True)
class Pool:
    """Places that are the same in all frames of a span, or tokens of one frame.

    ``places`` ``[n]`` int64, ascending, in a frame.
    """

    span: Span
    places: Tensor

    @property
    def frames(self) -> int:
        return self.span[1] - self.span[0]

    def mean(self, x: Tensor) -> Tensor:
        """Returns the tokens' means over the span ``[n, D]``, of ``x`` ``[T, N, D]``."""
        return x[self.span[0] : self.span[1], self.places].mean(0)


def pools_of(spans: Sequence[Span], still: Tensor, device: torch.device) -> list[Pool]:
    """Returns each segment's still places, then the others frame by frame, but for empty ones."""
    found = []
    for (first, end), places in zip(spans, still, strict=True):
        found.append(Pool((first, end), places.nonzero()[:, 0].to(device)))
        others = (~places).nonzero()[:, 0].to(device)
        found += [Pool((t, t + 1), others) for t in range(first, end)]
    return [pool for pool in found if len(pool.places)]


@dataclass(frozen=True)
class Made:
    """Outputs and what they are made of: ``rows`` ``[K]``, and edges ``[E]`` as of a ``Mix``."""

    rows: Tensor
    source: Tensor
    target: Tensor
    weight: Tensor


def copied(rows: Tensor) -> Made:
    """Makes outputs that are copies of tokens; ``rows`` ``[K]`` are their positions."""
    every = torch.arange(len(rows), device=rows.device)
    return Made(rows, rows, every, torch.ones(len(rows), device=rows.device))


def around_centres(pool: Pool, x: Tensor, k: int, near: int, beta: float | None) -> Made:
    """Merges the means of a pool into ``k`` of them, which count ``beta``, the others the rest.

    A centre to which nothing belongs stays as it is. It stands in the first frame of the span.

    Args:
        x: ``[T, N, D]``; near: by how many neighbours density is told, itself among them.
        beta: None = a centre counts as much as each of the others.
    """
    width, n = x.shape[1], len(pool.places)
    centres, cluster = density_peaks(pool.mean(x)[None], k, min(near, n))
    centres, turn = centres[0].sort()
    cluster = turn.argsort()[cluster[0]]
    others = torch.ones(n, dtype=torch.bool, device=x.device)
    others[centres] = False
    joined = torch.bincount(cluster[others], minlength=k).float()
    own = 1 / (1 + joined) if beta is None else torch.where(joined > 0, beta, 1.0)
    weight = ((1 - own) / joined.clamp(min=1))[cluster]
    weight[centres] = own
    frames = torch.arange(*pool.span, device=x.device)[:, None] * width
    return Made(
        frames[0] + pool.places[centres],
        (frames + pool.places).flatten(),
        cluster.expand(pool.frames, -1).flatten(),
        (weight / pool.frames).expand(pool.frames, -1).flatten(),
    )


def joined_up(parts: Sequence[Made], *, ascending: bool) -> Made:
    """Puts outputs after one another, or in the order of their places."""
    firsts = torch.tensor([0, *(len(part.rows) for part in parts)]).cumsum(0).tolist()
    rows = torch.cat([part.rows for part in parts])
    target = torch.cat([p.target + first for p, first in zip(parts, firsts, strict=False)])
    source, weight = (torch.cat([getattr(p, of) for p in parts]) for of in ("source", "weight"))
    if not ascending:
        return Made(rows, source, target, weight)
    order = rows.argsort()
    return Made(rows[order], source, order.argsort()[target], weight)


def stacked(made: Sequence[Made], n: int) -> Selection:
    """Returns the selection of videos of ``n`` tokens with as many outputs each.

    Edges that a video lacks repeat its last one with weight 0. Without more edges than outputs
    these are copies.
    """
    rows = torch.stack([one.rows for one in made])
    if all(len(one.source) == len(one.rows) for one in made):
        return Selection(rows, n)
    most = max(len(one.source) for one in made)

    def filled(x: Tensor, last: float | None = None) -> Tensor:
        tail = x[-1:] if last is None else torch.full_like(x[-1:], last)
        return torch.cat([x, tail.expand(most - len(x))])

    return Selection(
        rows,
        n,
        Mix(
            torch.stack([filled(one.source) for one in made]),
            torch.stack([filled(one.target) for one in made]),
            torch.stack([filled(one.weight, 0.0) for one in made]),
        ),
    )
