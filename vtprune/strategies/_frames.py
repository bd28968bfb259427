"""Base of strategies that compare the frames of a video."""

from __future__ import annotations

from dataclasses import dataclass

from vtprune.types import Budget, Facts, Frames, Need, Signals, Strategy


@dataclass(frozen=True)
class OfFrames(Strategy):
    """Reduces videos, each by itself; images, and videos of one frame, stay whole."""

    def needs(self, facts: Facts) -> tuple[Need, ...]:
        return (Frames(),)

    def counts(self, signals: Signals, budget: Budget) -> list[int]:
        if signals.grid is None or signals.grid[0] == 1:
            return [signals.n] * len(signals.tokens)
        return self.of_videos(signals, budget)

    def of_videos(self, signals: Signals, budget: Budget) -> list[int]:
        """Returns how many tokens of each video stay."""
        return [budget.count(signals.n)] * len(signals.tokens)
        return super().counts(signals, budget)
