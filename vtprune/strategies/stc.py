"""STC: as VidCom2, frame by frame as a stream comes: what is unlike the frame and all before.

Each frame keeps equally many tokens, the earlier ones what does not divide, by what has been seen
so far alone; ``vtprune.scoring.streaming.StreamingPruner`` does the same for frames one at a time.
The prefill gets shorter. arXiv 2512.00891. The official code keeps 60 tokens of each frame; its
cache of the vision tower is not here. Defaults: official code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vtprune.scoring.streaming import StreamingPruner
from vtprune.scoring.temporal import evenly
from vtprune.strategies._frames import OfFrames
from vtprune.types import Selection, Signals


@dataclass(frozen=True)
class STC(OfFrames):
    """It has no options: the budget is all there is to say."""

    def select(self, signals: Signals, k: int) -> Selection:
        frames = (signals.grid or (1,))[0]
        n = signals.n // frames
        each = evenly([n] * frames, k)
        rows = []
        for tokens in signals.tokens:
            pruner = StreamingPruner()
            kept = [
                t * n + pruner.update(frame, count)
                for t, (frame, count) in enumerate(zip(tokens.split(n), each, strict=True))
            ]
            rows.append(torch.cat(kept))
        return Selection(torch.stack(rows), signals.n)
