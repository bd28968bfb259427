"""FastVID: cut a video where it changes, keep what is salient, merge the rest into anchors.

A video is cut between the frames that are least alike. Each frame keeps its most salient tokens;
what is left of a segment is merged into density peaks of every fourth frame, from its end. The
prefill gets shorter. arXiv 2503.11187 (LunarShen/FastVID), as for LLaVA-OneVision. The official
frame features and salience are those of SigLIP's pooling head, which LLaVA leaves out; here they
are the means of frames and [CLS] attention, or attention received without a [CLS]. The official
rounding misses what is asked, and anchors beyond what a frame has cannot be served; here the count
is exact, and more salient tokens take their place. Defaults: official code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vtprune.errors import ConfigError
from vtprune.kernels.topk_sorted import ranked, topk_sorted
from vtprune.scoring.attention import salience, salience_needs
from vtprune.scoring.clustering import density_peaks
from vtprune.scoring.diversity import nearest
from vtprune.scoring.still import Made, Span, copied, joined_up, stacked
from vtprune.scoring.temporal import broken, evenly, framed
from vtprune.strategies._frames import OfFrames
from vtprune.types import Budget, Facts, Frames, Need, Positions, Selection, Signals

NEAR = 4  # neighbours by which density is told


@dataclass(frozen=True)
class FastVID(OfFrames):
    """``segments``: at least so many, cut wherever frames' cosine is below ``tau``, too.

    ``context``: the share of a frame's budget that goes to anchors. ``every``: one frame of so many
    has them. ``beta``: what an anchor counts at least. ``compat`` gives the official counts.
    """

    positions: ClassVar[Positions] = "keep"

    segments: int = 8
    tau: float = 0.9
    context: float = 0.4
    every: int = 4
    beta: float = 0.6
    compat: bool = False

    def __post_init__(self) -> None:
        for name in ("context", "beta"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}={getattr(self, name)!r} must be from 0 to 1.")
        if not -1 <= self.tau <= 1:
            raise ConfigError(f"tau={self.tau!r} must be a cosine, from -1 to 1.")
        for name in ("segments", "every"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name}={value!r} must be a count of at least 1.")

    def default_layers(self, facts: Facts) -> tuple[int, ...]:
        return (facts.feature_block,)

    def needs(self, facts: Facts) -> tuple[Need, ...]:
        return (Frames(), *salience_needs(self.used_layers(facts), facts))

    def of_videos(self, signals: Signals, budget: Budget) -> list[int]:
        share = budget.share(signals.n)
        if not self.compat or share == 1:
            return super().of_videos(signals, budget)
        frames = framed(signals)
        counts = [self._official(self.spans(x.mean(1)), x.shape[1], share) for x in frames]
        return [sum(salient) + sum(anchors) for salient, anchors in counts]

    def select(self, signals: Signals, k: int) -> Selection:
        return self.decide(signals, framed(signals).mean(2), k)

    def decide(self, signals: Signals, features: Tensor, k: int) -> Selection:
        """Decides with these features of frames, ``[B, T, G]``."""
        frames, share = framed(signals), signals.share or k / signals.n
        bad = broken(signals)
        seen = salience(signals).masked_fill(bad, -torch.inf)
        made = []
        for x, own, scores, worse in zip(frames, features, seen, bad, strict=True):
            spans, n = self.spans(own), x.shape[1]
            counts = self._official(spans, n, share) if self.compat else self._exact(spans, n, k)
            video = _Video(x.flatten(0, 1), scores, worse, n)
            made.append(video.kept(spans, *counts, self.beta))
        return stacked(made, signals.n)

    def spans(self, features: Tensor) -> list[Span]:
        """Returns the segments of a video, of features ``[T, G]`` of its frames."""
        alike = F.cosine_similarity(features[:-1], features[1:], dim=-1)
        fewest = ranked(-alike[None])[0, : self.segments - 1]
        cut = (alike < self.tau).index_fill(0, fewest, True)
        ends = [*(cut.nonzero()[:, 0] + 1).tolist(), len(features)]
        return list(zip([0, *ends], ends, strict=False))

    def _official(self, spans: list[Span], n: int, share: float) -> tuple[list[int], list[int]]:
        """Returns how many salient tokens and how many anchors each frame has."""
        each = int(n * share)
        context = int(each * self.context)
        anchors = []
        for first, end in spans:
            having = self._having_anchors(end - first)
            own = context * (end - first) // sum(having)
            anchors += [own * has for has in having]
        return [each - context] * len(anchors), anchors

    def _exact(self, spans: list[Span], n: int, k: int) -> tuple[list[int], list[int]]:
        """Returns the same with ``k`` in all, within the ``n`` tokens of a frame."""
        total = spans[-1][1]
        each = evenly([n] * total, k)
        context = [int(own * self.context) for own in each]
        salient = [own - less for own, less in zip(each, context, strict=True)]
        anchors: list[int] = []
        for first, end in spans:
            having = self._having_anchors(end - first)
            wanted = sum(context[first:end])
            rooms = [(n - own) * has for own, has in zip(salient[first:end], having, strict=True)]
            anchors += evenly(rooms, min(wanted, sum(rooms)))
            rooms = [n - own for own in salient[first:end]]
            rooms = [room - own for room, own in zip(rooms, anchors[first:end], strict=True)]
            more = evenly(rooms, wanted - sum(anchors[first:end]))
            salient[first:end] = [a + b for a, b in zip(salient[first:end], more, strict=True)]
        return salient, anchors

    def _having_anchors(self, frames: int) -> list[bool]:
        return [(frames - 1 - i) % self.every == 0 for i in range(frames)]


@dataclass(frozen=True)
class _Video:
    """Tokens ``[T * N, D]``, their salience and whether they are broken, and N."""

    tokens: Tensor
    salience: Tensor
    broken: Tensor
    n: int

    def kept(self, spans: list[Span], salient: list[int], anchors: list[int], beta: float) -> Made:
        tops = topk_sorted(self.salience.view(-1, self.n), salient)
        rest = torch.ones(len(self.tokens), dtype=torch.bool, device=tops.device)
        parts = []
        for frame, row in enumerate(tops):
            top = row[row >= 0] + frame * self.n
            rest[top] = False
            parts.append(copied(top))
        for first, end in spans:
            inside = torch.arange(first * self.n, end * self.n, device=tops.device)
            pool = inside[rest[first * self.n : end * self.n]]
            for frame in range(first, end):
                if anchors[frame]:
                    own = pool[(pool // self.n) == frame]
                    parts.append(self._merged(own, pool, anchors[frame], beta))
        return joined_up(parts, ascending=True)

    def _merged(self, own: Tensor, pool: Tensor, k: int, beta: float) -> Made:
        """Merges ``pool`` into ``k`` of ``own``, both positions."""
        centres, _ = density_peaks(self.tokens[own][None], k, min(NEAR, len(own)))
        rows = own[centres[0].sort().values]
        pool = pool[~self.broken[pool]]
        target = nearest(self.tokens[pool][None], self.tokens[rows][None])[0]
        joined = torch.bincount(target, minlength=k).float()
        weight = (1 / (joined + 1)).clamp(min=beta)
        others = ((1 - weight) / joined.clamp(min=1))[target]
        every = torch.arange(k, device=rows.device)
        return Made(
            rows,
            torch.cat([rows, pool]),
            torch.cat([every, target]),
            torch.cat([weight, others]),
        )
