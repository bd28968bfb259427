"""V-CAST: frames at which the video turns keep more; in a frame what is unlike its mean, or large.

A frame's budget follows the curvature of the path of frame means, a token's score how far it is
from the mean of its frame, and its norm. The prefill gets shorter. arXiv 2603.27650. The official
code gives all tokens left over by rounding to one frame; here they go by largest remainder.
Defaults: official code.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import ClassVar

from torch import Tensor

from vtprune.errors import ConfigError
from vtprune.scoring.temporal import (
    best_of_frames,
    broken,
    changes,
    curvature,
    framed,
    rounded,
)
from vtprune.strategies._frames import OfFrames
from vtprune.types import Positions, Selection, Signals

EPS = 1e-6


@dataclass(frozen=True)
class VCast(OfFrames):
    """``temperature`` (> 0) of the softmax over frames; ``least`` (>= 0) tokens that a frame keeps.

    Where the budget has fewer tokens for a frame, that is all it is promised. ``compat`` gives what
    rounding leaves over to one frame.
    """

    positions: ClassVar[Positions] = "keep"

    temperature: float = 0.7
    least: int = 1
    compat: bool = False

    def __post_init__(self) -> None:
        if not (self.temperature > 0 and isfinite(self.temperature)):
            raise ConfigError(f"temperature={self.temperature!r} must be a number above 0.")
        if isinstance(self.least, bool) or not isinstance(self.least, int) or self.least < 0:
            raise ConfigError(f"least={self.least!r} must be a count of at least 0.")

    def select(self, signals: Signals, k: int) -> Selection:
        frames = framed(signals)
        kept = best_of_frames(_scores(frames), self.budgets(frames, k), broken(signals), k)
        return Selection(kept, signals.n)

    def budgets(self, frames: Tensor, k: int) -> Tensor:
        """Returns what each frame keeps, ``[B, T]`` int64."""
        number, most = frames.shape[1:3]
        least = min(self.least, k // number, most)
        weights = (curvature(frames) / self.temperature).softmax(-1)
        rest = k - number * least
        return least + rounded(weights * rest, rest, most - least, greedy=self.compat)


def _scores(frames: Tensor) -> Tensor:
    """Returns the distance from the frame's mean, and the norm from 0 to 1, ``[B, T, N]``."""
    unlike = changes(frames, frames.mean(2, keepdim=True).expand_as(frames))
    norm = frames.norm(dim=-1)
    low, high = norm.amin(-1, keepdim=True), norm.amax(-1, keepdim=True)
    return unlike + (norm - low) / (high - low + EPS)
