"""EVS: keep the tokens of a video that changed most since the frame before.

A token is compared with the one at its place in the frame before, whether that stays or not; the
first frame comes first, and a frame may lose everything. The prefill gets shorter. arXiv 2510.14624
(vLLM's code). The official floor, by which the whole first frame stays whatever is asked, is left
to compat. Defaults: official code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from vtprune.scoring.temporal import broken, changes, framed
from vtprune.strategies._frames import OfFrames
from vtprune.types import Budget, Positions, Signals

FIRST = 255.0  # of every token of the first frame; others reach 2


@dataclass(frozen=True)
class EVS(OfFrames):
    """``compat`` keeps at least the first frame, and rounds the budget down."""

    positions: ClassVar[Positions] = "keep"

    compat: bool = False

    def of_videos(self, signals: Signals, budget: Budget) -> list[int]:
        if not self.compat:
            return super().of_videos(signals, budget)
        frame = signals.n // (signals.grid or (1,))[0]
        return [max(frame, int(signals.n * budget.share(signals.n)))] * len(signals.tokens)

    def score(self, signals: Signals) -> Tensor:
        frames = framed(signals)
        changed = changes(frames[:, 1:], frames[:, :-1])
        score = F.pad(changed, (0, 0, 1, 0), value=FIRST).flatten(1)
        return score.masked_fill(broken(signals), -FIRST)
