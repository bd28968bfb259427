"""PruneVid: merge what stays the same in a segment, then keep what the question looks at.

Before the language model frames are clustered, and runs of one cluster are segments. Places that
are alike all over a segment are averaged over it; these, and what is left of each frame, are merged
into clusters around density peaks. After layer 10 of 32 of the language model those tokens stay to
which any word after the video attends most with any head, in equal shares of each segment and each
frame. The prefill gets shorter twice. arXiv 2412.16117 (Visual-AI/PruneVid). Positions are
renumbered before the language model, and kept inside it. ``keep`` is what is left in the end, so
``keep / alpha`` enters the language model, up to everything, and clusters are as many as that
takes; the official code has shares instead, 0.5 and 0.4, and drops the tokens from the caches of
the first layers too, which here hold what these layers saw. Clusters of frames without neighbours,
which the official code divides by zero for, are of dynamic tokens alone. Defaults: official code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vtprune.errors import ConfigError
from vtprune.kernels.topk_sorted import topk_sorted
from vtprune.scoring.runs import clustered, steadiness
from vtprune.scoring.still import (
    Made,
    Pool,
    around_centres,
    copied,
    joined_up,
    loosened,
    pools_of,
    stacked,
)
from vtprune.scoring.temporal import framed, in_proportion
from vtprune.scoring.videos import Video
from vtprune.strategies._frames import Narrowing
from vtprune.types import Budget, Facts, Need, Selection, Signals, TextPeak

FEW = 14  # tokens that are officially not clustered


@dataclass(frozen=True)
class PruneVid(Narrowing):
    """``tau``: the mean cosine from which a place is the same. ``segments``: clusters per frame.

    ``near``: neighbours by which density is told. ``alpha``: share of the tokens that stay inside
    the language model; 1 = all, so that everything happens before it. ``compat`` gives the official
    order, and counts by ``cluster``, the share of merged tokens, and ``alpha``; ``keep`` is then
    the most that stays.
    """

    tau: float = 0.8
    segments: float = 0.25
    near: int = 7
    cluster: float = 0.5
    alpha: float = 0.4
    compat: bool = False

    def __post_init__(self) -> None:
        if not -1 <= self.tau <= 1:
            raise ConfigError(f"tau={self.tau!r} must be a cosine, from -1 to 1.")
        for name in ("segments", "cluster", "alpha"):
            value = getattr(self, name)
            if isinstance(value, bool) or not 0 < value <= 1:
                raise ConfigError(f"{name}={value!r} must be a share above 0 and up to 1.")
        if isinstance(self.near, bool) or not isinstance(self.near, int) or self.near < 1:
            raise ConfigError(f"near={self.near!r} must be a count of at least 1.")

    @property
    def left(self) -> float:
        return self.alpha

    def inside(self, facts: Facts) -> tuple[int, tuple[Need, ...]]:
        layer = facts.scale_decoder(11, 32)
        return layer, (TextPeak(layer - 1),)

    def of_videos(self, signals: Signals, budget: Budget) -> list[int]:
        most = super().of_videos(signals, budget)
        if not self.compat or budget.share(signals.n) == 1:
            return most
        found = [sum(self._clusters(self.pools(x))) for x in framed(signals)]
        return [min(pair) for pair in zip(most, found, strict=True)]

    def outside(self, signals: Signals, k: int) -> Selection:
        made = []
        for x in framed(signals):
            pools = self.pools(x, 0 if self.compat else k)
            quotas = self._clusters(pools) if self.compat else []
            if sum(quotas) != k:
                pools = self.pools(x, k)
                quotas = in_proportion([len(pool.places) for pool in pools], k)
            parts = [
                around_centres(pool, x, quota, self.near, None)
                for pool, quota in zip(pools, quotas, strict=True)
                if quota
            ]
            made.append(joined_up(parts, ascending=not self.compat))
        return stacked(made, signals.n)

    def pools(self, x: Tensor, k: int = 0) -> list[Pool]:
        """Returns what is merged, ``k`` tokens or more, of ``x`` ``[T, N, D]``."""
        spans = clustered(x.mean(1), self.segments, self.near)
        alike = steadiness(x, spans).cpu()
        return pools_of(spans, loosened(spans, alike >= self.tau, -alike, k), x.device)

    def _clusters(self, pools: Sequence[Pool]) -> list[int]:
        """Returns the official numbers of clusters."""
        sizes = [len(pool.places) for pool in pools]
        return [n if n <= FEW else max(1, int(n * self.cluster)) for n in sizes]

    def staying(self, found: Sequence[Video], budget: Budget) -> list[int]:
        counts = super().staying(found, budget)
        if not self.compat:
            return counts
        return [
            n if n == video.whole else min(n, max(1, sum(self._official(video))))
            for video, n in zip(found, counts, strict=True)
        ]

    def within(self, signals: Signals, row: int, video: Video, k: int) -> Made:
        seen = signals.stack(TextPeak)[-1, row, video.places]
        quotas = self._official(video)
        if not self.compat or sum(quotas) != k:
            quotas = in_proportion(video.sizes, k)
        kept = []
        for pool, quota in enumerate(quotas):
            own = (video.pool == pool).nonzero()[:, 0]
            kept.append(own[topk_sorted(seen[own][None], quota)[0]])
        return copied(video.places[torch.cat(kept)].sort().values)

    def _official(self, video: Video) -> list[int]:
        return [int(self.alpha * n) for n in video.sizes]
