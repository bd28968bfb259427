"""DyCoke: of four frames one stays whole, the others keep what is least like the frame before it.

In a group the second and the third are compared with the first, the fourth with the third. The
prefill gets shorter. arXiv 2411.15024 (KD-TAO/DyCoke), its part before the language model; nothing
is merged there despite its name. The official code drops an odd last frame, leaves the third frame
of the last group whole and cannot take fewer than five frames; here up to four make pairs, and
frames share what is asked evenly, the earlier first. Below a quarter the whole frames, too, lose
what is most like the whole frame before. Defaults: official code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vtprune.scoring.temporal import best_of_frames, broken, changes, evenly, framed
from vtprune.strategies._frames import OfFrames
from vtprune.types import Budget, Selection, Signals

GROUP = 4
DIGITS = 9  # to which a share gives back the decimal that the authors' K was


@dataclass(frozen=True)
class DyCoke(OfFrames):
    """``compat`` gives frames the official counts: (1 - K) of them, rounded down, but for one."""

    compat: bool = False

    def of_videos(self, signals: Signals, budget: Budget) -> list[int]:
        if not self.compat or budget.share(signals.n) == 1:
            return super().of_videos(signals, budget)
        return [sum(self.budgets(signals, budget.share(signals.n)))] * len(signals.tokens)

    def select(self, signals: Signals, k: int) -> Selection:
        frames = framed(signals)
        budgets = _even(frames.shape[1], frames.shape[2], k)
        if self.compat:
            share = k / signals.n if signals.share is None else signals.share
            budgets = self.budgets(signals, share)
        score = changes(frames, frames[:, _references(frames.shape[1])])
        score = torch.cat([torch.full_like(score[:, :1], 2.0), score[:, 1:]], dim=1)
        each = torch.tensor(budgets, device=score.device).expand(len(score), -1)
        return Selection(best_of_frames(score, each, broken(signals), k), signals.n)

    def budgets(self, signals: Signals, share: float) -> list[int]:
        """Returns what each frame keeps officially where ``share`` of four stays on average."""
        frames = (signals.grid or (1,))[0]
        n = signals.n // frames
        dropped = round(1 - (GROUP * share - 1) / (GROUP - 1), DIGITS)
        few = max(0, int((1 - dropped) * n))
        counts = [few if i % 2 or (i % GROUP and i < frames - 2) else n for i in range(frames)]
        return counts[: frames - frames % 2] + [0] * (frames % 2)


def _group(frames: int) -> int:
    """Returns how many frames go with a whole one; officially too few make pairs."""
    return GROUP if frames > GROUP else 2


def _even(frames: int, n: int, k: int) -> list[int]:
    """Returns what each frame keeps: ``n`` the whole ones, the others evenly what is left of k."""
    whole = range(0, frames, _group(frames))
    others = [i for i in range(frames) if i not in whole]
    counts = [0] * frames
    for members in (whole, others):
        part = min(k, len(members) * n)
        for i, own in zip(members, evenly([n] * len(members), part), strict=True):
            counts[i] = own
        k -= part
    return counts


def _references(frames: int) -> list[int]:
    """Returns with which frame each is compared; the first, which has none before, with itself."""
    group = _group(frames)
    before = [i - 1 if i % 2 else i - (i % group or group) for i in range(frames)]
    return [max(0, i) for i in before]
