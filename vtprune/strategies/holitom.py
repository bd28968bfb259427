"""HoliTom: cut a video where most stands still, average what does, and keep the rest by attention.

Segments are those by which most tokens are redundant. Places that stand still in one are averaged
over its frames and merged around density peaks; of the others each frame keeps those that get most
attention in the tower. The prefill gets shorter. arXiv 2505.21334 (cokeshao/HoliTom). With
``inner`` tokens merge once more, before layer 18 of 28 of the language model: those stay to which
the last token attends most in the layer before (mean over heads), and of the others one by one goes
into the most similar of them. Positions are renumbered before the language model, and kept inside
it; ``keep`` is what is left in the end, so ``keep / (1 - inner)`` enters it. The official counts
miss what is asked by a few tokens, those of a segment's still places come first, and where more is
asked than is left by averaging it is not given; here the places that stand least still are then not
averaged. There is no official code for towers other than SigLIP's; others use attention received
too. Defaults: official code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from vtprune.errors import ConfigError
from vtprune.kernels.topk_sorted import topk_sorted
from vtprune.scoring.still import (
    Made,
    Pool,
    around_centres,
    copied,
    joined_up,
    loosened,
    most_changed,
    pools_of,
    segments,
    stacked,
    still_places,
    still_runs,
)
from vtprune.scoring.temporal import broken, changes, framed, in_proportion
from vtprune.scoring.videos import Video, running_means
from vtprune.strategies._frames import Narrowing
from vtprune.types import Budget, Facts, Frames, LastRow, Need, Received, Selection, Signals

WINDOW = 1024  # frames of the longest segment


@dataclass(frozen=True)
class HoliTom(Narrowing):
    """``tau``: the cosine above which a place stands still. ``beta``: what a centre counts.

    ``near``: neighbours by which density is told. ``contextual``: share of a frame's own budget
    that goes to centres of what attention leaves. ``inner``: share of the tokens that merge inside
    the language model, officially 0 or 0.5. ``compat`` gives the official counts and order.
    """

    tau: float = 0.8
    beta: float = 0.6
    near: int = 7
    contextual: float = 0.0
    inner: float = 0.0
    compat: bool = False

    def __post_init__(self) -> None:
        for name in ("tau", "beta", "contextual"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}={getattr(self, name)!r} must be from 0 to 1.")
        if isinstance(self.near, bool) or not isinstance(self.near, int) or self.near < 1:
            raise ConfigError(f"near={self.near!r} must be a count of at least 1.")
        if isinstance(self.inner, bool) or not 0 <= self.inner < 1:
            raise ConfigError(f"inner={self.inner!r} must be a share from 0 to below 1.")

    def default_layers(self, facts: Facts) -> tuple[int, ...]:
        return (facts.feature_block,)

    def needs(self, facts: Facts) -> tuple[Need, ...]:
        return (Frames(), *(Received(layer) for layer in self.used_layers(facts)))

    def of_videos(self, signals: Signals, budget: Budget) -> list[int]:
        share = budget.share(signals.n)
        if not self.compat or share == 1:
            return super().of_videos(signals, budget)
        return [sum(_official(self.pools(x), share)) for x in framed(signals)]

    def outside(self, signals: Signals, k: int) -> Selection:
        frames, share = framed(signals), signals.share or k / signals.n
        salience = signals.stack(Received).sum(0).masked_fill(broken(signals), -torch.inf)
        made = []
        for x, seen in zip(frames, salience.view(frames.shape[:3]), strict=True):
            pools = self.pools(x, 0 if self.compat else k)
            quotas = _official(pools, share) if self.compat else _exact(pools, k)
            parts = [
                self.kept(pool, quota, x, seen)
                for pool, quota in zip(pools, quotas, strict=True)
                if quota
            ]
            made.append(joined_up(parts, ascending=not self.compat))
        return stacked(made, signals.n)

    def pools(self, x: Tensor, k: int = 0) -> list[Pool]:
        """Returns what is chosen from, ``k`` tokens or more, of ``x`` ``[T, N, D]``."""
        changed = changes(x[1:], x[:-1]).cpu()
        runs = still_runs(changed < 1 - self.tau)
        spans, _ = segments(runs, WINDOW)
        still = loosened(spans, still_places(spans, runs), most_changed(spans, changed), k)
        return pools_of(spans, still, x.device)

    def kept(self, pool: Pool, k: int, x: Tensor, salience: Tensor) -> Made:
        """Returns ``k`` outputs of a pool; ``salience`` is ``[T, N]``."""
        if pool.frames > 1:
            return around_centres(pool, x, k, min(self.near, k), self.beta)
        first = pool.span[0] * x.shape[1]
        seen = salience[pool.span[0], pool.places]
        top = topk_sorted(seen[None], round(k * (1 - self.contextual)))[0]
        rest = torch.ones_like(pool.places, dtype=torch.bool).index_fill(0, top, False)
        parts = [copied(first + pool.places[top])]
        if len(top) < k:
            left = Pool(pool.span, pool.places[rest])
            more = k - len(top)
            parts.append(around_centres(left, x, more, min(self.near, more), self.beta))
        return joined_up(parts, ascending=False)

    @property
    def left(self) -> float:
        return 1 - self.inner

    def inside(self, facts: Facts) -> tuple[int, tuple[Need, ...]]:
        layer = facts.scale_decoder(18, 28)
        return layer, (LastRow(layer - 1),)

    def staying(self, found: Sequence[Video], budget: Budget) -> list[int]:
        if not self.compat:
            return super().staying(found, budget)
        left = [max(self.left, budget.share(video.whole)) for video in found]
        return [
            max(1, round(len(video.places) * share))
            for video, share in zip(found, left, strict=True)
        ]

    def within(self, signals: Signals, row: int, video: Video, k: int) -> Made:
        seen = signals.stack(LastRow)[-1, row, video.places]
        kept = video.places[topk_sorted(seen[None], k)[0]]
        return running_means(video.places, kept, signals.tokens[row])


def _official(pools: Sequence[Pool], share: float) -> list[int]:
    """Returns the counts of pools where ``share`` of all tokens of a video is asked for."""
    tokens = sum(pool.frames * len(pool.places) for pool in pools)
    share = min(1.0, share / (sum(len(pool.places) for pool in pools) / tokens))
    return [(round if pool.frames > 1 else ceil)(len(pool.places) * share) for pool in pools]


def _exact(pools: Sequence[Pool], k: int) -> list[int]:
    """Returns counts that sum to ``k``, in proportion."""
    return in_proportion([len(pool.places) for pool in pools], k)
