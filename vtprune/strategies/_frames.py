"""Base of strategies that compare the frames of a video."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from vtprune.errors import UnsupportedError
from vtprune.scoring.schedule import Before
from vtprune.scoring.still import Made, copied, joined_up, stacked
from vtprune.scoring.temporal import in_proportion
from vtprune.scoring.videos import Video, videos
from vtprune.types import (
    Budget,
    Facts,
    Frames,
    Need,
    Selection,
    Signals,
    Site,
    Spans,
    Stage,
    Strategy,
)


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


@dataclass(frozen=True)
class Narrowing(OfFrames):
    """Leaves more than the budget before the language model, and the budget inside it."""

    @property
    def left(self) -> float:
        """What share of a video's tokens stays of those that enter the inner layer."""
        raise NotImplementedError(f"{type(self).__name__} must define left.")

    def inside(self, facts: Facts) -> tuple[int, tuple[Need, ...]]:
        """Returns the layer before which tokens leave, and what is read of the one before it."""
        raise NotImplementedError(f"{type(self).__name__} must define inside().")

    def plan(self, facts: Facts) -> tuple[Stage, ...]:
        (outer,) = super().plan(facts)
        if self.left == 1:
            return (outer,)
        if facts.decoder_layers <= facts.first_stage:
            raise UnsupportedError(
                f"{facts.family} has no layer of its language model before which tokens may leave. "
                f"Let {self.name} act before it alone, see its options."
            )
        layer, needs = self.inside(facts)
        inner = Stage(Site.DECODER, (Spans(layer), *needs), layer, positions="keep")
        return replace(outer, times=Before(self.left)), inner

    def counts(self, signals: Signals, budget: Budget) -> list[int]:
        if signals.inside is None:
            return super().counts(signals, budget)
        counted = []
        for row in range(len(signals.tokens)):
            found, others = videos(signals, row)
            counted.append(len(others) + sum(self.staying(found, budget)))
        return counted

    def staying(self, found: Sequence[Video], budget: Budget) -> list[int]:
        """Returns how many tokens of each video stay inside the language model."""
        return [min(len(video.places), budget.count(video.whole)) for video in found]

    def select(self, signals: Signals, k: int) -> Selection:
        if signals.inside is None:
            return self.outside(signals, k)
        made = []
        for row in range(len(signals.tokens)):
            found, others = videos(signals, row)
            counts = self.staying(found, signals.budget) if signals.budget else []
            if sum(counts) != k - len(others):  # some tokens may not be chosen from
                counts = in_proportion([len(video.places) for video in found], k - len(others))
            parts = [
                self.within(signals, row, video, count)
                for video, count in zip(found, counts, strict=True)
                if count
            ]
            made.append(joined_up([copied(others), *parts], ascending=True))
        return stacked(made, signals.n)

    def outside(self, signals: Signals, k: int) -> Selection:
        """Returns the selection before the language model, as ``select`` does."""
        raise NotImplementedError(f"{type(self).__name__} must define outside().")

    def within(self, signals: Signals, row: int, video: Video, k: int) -> Made:
        """Returns ``k`` outputs of a video inside the language model."""
        raise NotImplementedError(f"{type(self).__name__} must define within().")
