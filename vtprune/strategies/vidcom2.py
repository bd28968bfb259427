"""VidCom2: keep what is least typical of the video and of its frame; odd frames keep more.

Distances to the means of the video and of the frame are taken on the half of the channels that vary
least. The prefill gets shorter. arXiv 2505.14454 (xuyang-liu16/VidCom2). The frames' own budgets
miss what was asked; as in vLLM's code the most typical then leave, or the least typical come back.
Defaults: official code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from vtprune.scoring.temporal import (
    best_of_frames,
    broken,
    framed,
    steady_channels,
    typicality,
    uniqueness,
)
from vtprune.strategies._frames import OfFrames
from vtprune.types import Budget, Selection, Signals

SHARPNESS = 0.01  # of the softmax over frames


@dataclass(frozen=True)
class VidCom2(OfFrames):
    """``compat`` leaves the frames their own budgets, which sum to a little more or less."""

    compat: bool = False

    def of_videos(self, signals: Signals, budget: Budget) -> list[int]:
        if not self.compat:
            return super().of_videos(signals, budget)
        return self.budgets(signals, budget.share(signals.n)).sum(1).tolist()

    def select(self, signals: Signals, k: int) -> Selection:
        video, frame = self.typicalities(signals)
        share = k / signals.n if signals.share is None else signals.share
        budgets = self.budgets(signals, share)
        return Selection(best_of_frames(-(video + frame), budgets, broken(signals), k), signals.n)

    def typicalities(self, signals: Signals) -> tuple[Tensor, Tensor]:
        """Returns how typical tokens are of their video, and of their frame, ``[B, T, N]`` each."""
        frames = framed(signals)
        steady = steady_channels(frames)[:, None, None].expand(*frames.shape[:3], -1)
        units = F.normalize(frames.gather(3, steady), dim=-1)
        video = units.mean(dim=(1, 2), keepdim=True)
        return typicality(units, video), typicality(units, units.mean(dim=2, keepdim=True))

    def budgets(self, signals: Signals, share: float) -> Tensor:
        """Returns what each frame keeps of its tokens, at least one, ``[B, T]`` int64."""
        video = self.typicalities(signals)[0]
        n = video.shape[2]
        return (uniqueness(video, share, SHARPNESS) * n).round().long().clamp(1, n)
