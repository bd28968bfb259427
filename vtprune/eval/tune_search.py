"""Successive halving over settings, and a test of the best ones on samples that it did not see.

Each round measures the settings that are left on twice as many samples and keeps half of them.
What is left is tested on fresh samples, the safest first and then ever better ones, until the first
that fails. In that order no correction for several tests is due: to return a wrong setting, the
first wrong one of the sequence must pass, at the error allowed for one test (Maurer, Hothorn and
Lehmacher 1995).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from vtprune.errors import ConfigError
from vtprune.eval._extras import need
from vtprune.eval.budgets import Point
from vtprune.eval.tune_stats import Paired, chance, confirms, least

FINALISTS = 4  # that are left when the halving ends
HOPE = 0.05  # chance below which a setting is not worth the fresh samples


@dataclass(frozen=True)
class Seen:
    """One setting beside the unpruned model on the same samples.

    Attributes:
        right: answers of the setting that are right; ``unpruned_right`` those of the model.
        flops: mean share of the unpruned FLOPs; None = not known.
        ms: per sample, one value for each whole batch; ``unpruned_ms`` of the model.
    """

    point: Point
    paired: Paired
    right: int
    flops: float | None
    ms: tuple[float, ...]
    unpruned_ms: tuple[float, ...]

    @property
    def unpruned_right(self) -> int:
        return self.right + self.paired.lost - self.paired.gained

    @property
    def median_ms(self) -> float:
        return statistics.median(self.ms)


# Measures settings on the samples ``first`` to ``end - 1`` of each task.
Look = Callable[[Sequence[Point], int, int], list[Seen]]


class Goal(Protocol):
    """What is sought: a bound that a setting must hold, and what makes one better than another."""

    def chance(self, seen: Seen, fresh: int) -> float:
        """Returns about how probable it is that ``fresh`` samples show that the bound holds."""
        ...

    def worth(self, seen: Seen) -> float:
        """Returns how good a setting is if it holds the bound; 0 or less = not worth having."""
        ...

    def holds(self, seen: Seen) -> bool:
        """Whether these samples show that the bound holds."""
        ...

    def check(self, fresh: int, batches: int) -> None:
        """Raises ConfigError where so few fresh samples, in whole batches, cannot show it."""
        ...


@dataclass(frozen=True)
class MaxDrop:
    """The cheapest setting whose accuracy is less than ``bound`` (a share) below unpruned.

    ``by`` says what is cheap: ``flops`` or ``ms``.
    """

    bound: float
    confidence: float
    by: str = "flops"

    def chance(self, seen: Seen, fresh: int) -> float:
        return chance(seen.paired, self.bound, self.confidence, fresh)

    def worth(self, seen: Seen) -> float:
        if self.by == "ms":
            return 1 - seen.median_ms / statistics.median(seen.unpruned_ms)
        if seen.flops is None:
            raise ConfigError(
                f"The FLOPs of {seen.point.strategy} in this model are not known. Say --by ms."
            )
        return 1 - seen.flops

    def holds(self, seen: Seen) -> bool:
        return confirms(seen.paired, self.bound, self.confidence)

    def check(self, fresh: int, batches: int) -> None:
        wanted = least(self.bound, self.confidence)
        if fresh >= wanted:
            return
        low, high = self.bound, 1.0
        while high - low > 1e-4:
            middle = (low + high) / 2
            low, high = (middle, high) if least(middle, self.confidence) > fresh else (low, middle)
        raise ConfigError(
            f"{fresh} samples for the test cannot confirm a drop of at most "
            f"{100 * self.bound:g} points with confidence {self.confidence:g}, even if no answer "
            f"changes: that takes {wanted}, and more where answers change. So few can confirm "
            f"{100 * high:.1f} points at best."
        )


@dataclass(frozen=True)
class MaxMs:
    """The most accurate setting whose median batch takes at most ``bound`` ms per sample."""

    bound: float
    confidence: float

    def chance(self, seen: Seen, fresh: int) -> float:
        """Returns the chance that the median is within the bound, by how many batches are.

        Above the bound it is less with every millisecond: where no batch keeps it, the fastest
        setting is the likeliest.
        """
        fast = self._fast(seen)
        beta: Any = need("scipy.stats", extra="eval").beta
        odds = float(beta.sf(0.5, fast + 1, len(seen.ms) - fast + 1))
        return odds * min(1.0, self.bound / seen.median_ms)

    def worth(self, seen: Seen) -> float:
        return seen.right / seen.paired.n

    def holds(self, seen: Seen) -> bool:
        """Whether more batches keep the bound than would by luck (sign test of the median)."""
        test = need("scipy.stats", extra="eval").binomtest(
            self._fast(seen), len(seen.ms), 0.5, alternative="greater"
        )
        return float(test.pvalue) <= 1 - self.confidence

    def check(self, fresh: int, batches: int) -> None:
        wanted = math.ceil(math.log2(1 / (1 - self.confidence)))
        if batches < wanted:
            raise ConfigError(
                f"{batches} whole batches for the test cannot confirm a median time with "
                f"confidence {self.confidence:g}: that takes {wanted}."
            )

    def _fast(self, seen: Seen) -> int:
        return sum(ms <= self.bound for ms in seen.ms)


@dataclass(frozen=True)
class Round:
    """A round of the halving: how many settings were measured and stay, and the most promising."""

    measured: int
    stay: int
    best: Seen


def sizes(n_points: int, samples: int, batch: int) -> list[tuple[int, int]]:
    """Returns per round how many settings stay, and the samples per task, in whole batches.

    The last round has all ``samples``, each one before it half as many.
    """
    stay = [n_points]
    while stay[-1] > FINALISTS:
        stay.append(max(FINALISTS, math.ceil(stay[-1] / 2)))
    rounds = stay[1:] or stay
    each = [samples / 2**i for i in reversed(range(len(rounds)))]
    return [
        (n, min(samples, max(1, math.ceil(size / batch)) * batch))
        for n, size in zip(rounds, each, strict=True)
    ]


def search(
    points: Sequence[Point],
    look: Look,
    goal: Goal,
    samples: int,
    batch: int,
    fresh: int,
    told: Callable[[Round], None] = lambda one: None,
) -> list[Seen]:
    """Returns the settings to test, the safest first and each later one better than those before.

    Args:
        points: the settings to choose from.
        samples: per task, that the search may see: those up to this one.
        batch: samples that are measured together.
        fresh: samples of the test, all tasks together.
        told: is told of every round.

    Raises:
        ConfigError: there is none, or none that is worth having.
    """
    left, seen = list(points), []
    for stay, size in sizes(len(left), samples, batch):
        seen = [one for one in look(left, 0, size) if goal.worth(one) > 0]
        if not seen:
            raise ConfigError(
                "No setting is better than the unpruned model. Try other strategies or budgets."
            )
        best = max(seen, key=lambda one: goal.chance(one, fresh) * goal.worth(one))
        seen = better(seen, stay, goal, fresh)
        told(Round(len(left), len(seen), best))
        left = [one.point for one in seen]
    return chain(seen, goal, fresh)


def better(seen: Sequence[Seen], stay: int, goal: Goal, fresh: int) -> list[Seen]:
    """Returns the settings that stay: by turns the likeliest to hold and the most promising.

    Without the likeliest the first of the test would too often be one that fails.
    """
    odds = {one.point: goal.chance(one, fresh) for one in seen}
    likely = sorted(seen, key=lambda one: (-odds[one.point], -goal.worth(one)))
    promising = sorted(seen, key=lambda one: -odds[one.point] * goal.worth(one))
    turns = (one for pair in zip(likely, promising, strict=True) for one in pair)
    return list({one.point: one for one in turns}.values())[:stay]


def chain(seen: Sequence[Seen], goal: Goal, fresh: int) -> list[Seen]:
    """Returns the settings from the likeliest to hold the bound on, those that are ever better."""
    odds = {one.point: goal.chance(one, fresh) for one in seen}
    first, *others = sorted(seen, key=lambda one: (-odds[one.point], -goal.worth(one)))
    found = [first]
    for one in others:
        if odds[one.point] >= HOPE and goal.worth(one) > goal.worth(found[-1]):
            found.append(one)
    return found


def confirm(
    finalists: Sequence[Seen], look: Look, goal: Goal, first: int, end: int
) -> list[tuple[Seen, bool]]:
    """Tests settings in turn on fresh samples, up to the first that fails.

    Returns:
        What was seen of each, and whether it was shown to hold the bound. The last that was is the
        best.
    """
    tested: list[tuple[Seen, bool]] = []
    for one in finalists:
        (seen,) = look([one.point], first, end)
        tested.append((seen, goal.holds(seen)))
        if not tested[-1][1]:
            break
    return tested
