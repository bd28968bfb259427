"""Intervals, and the summary of one point of a sweep."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from vtprune.eval._extras import need
from vtprune.eval.budgets import CEILING, Point
from vtprune.eval.rows import Answer, Timing

Z95 = 1.959963984540054
Right = bool | float  # how right an answer is, 0 to 1


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Summary:
    """One point: shares in 0 to 1, mean visual tokens kept, milliseconds (None = not timed).

    ``flops`` is the mean share of the unpruned prefill, ``cache`` that of the unpruned cache's
    bytes (None = not known).
    """

    strategy: str
    budget: str
    n: int
    accuracy: Interval
    difference: Interval | None
    kept: float
    flops: float | None
    ms: float | None
    kinds: dict[str, float]
    cache: float | None = None


def accuracy(right: int, n: int) -> Interval:
    """Returns the share ``right / n`` with the Wilson interval."""
    test = need("scipy.stats", extra="eval").binomtest(right, n)
    low, high = test.proportion_ci(method="wilson")
    return Interval(right / n, float(low), float(high))


def mean_right(rights: Sequence[Right]) -> Interval:
    """Returns how right answers are on average; of mere right and wrong with ``accuracy``."""
    if _all_or_nothing(rights):
        return accuracy(round(sum(rights)), len(rights))
    return _of_mean(rights, 0.0)


def paired_difference(ours: Sequence[Right], base: Sequence[Right]) -> Interval:
    """Returns mean(ours) - mean(base) over the same samples.

    The interval is the normal approximation for paired shares with one sample added to each kind
    of change, gained and lost (Bonett and Price 2012), so it has a width even where none changed.
    Where answers are right in part it is that of a mean.
    """
    if not _all_or_nothing([*ours, *base]):
        return _of_mean([a - b for a, b in zip(ours, base, strict=True)], -1.0)
    n = len(ours)
    gained = sum(a and not b for a, b in zip(ours, base, strict=True))
    lost = sum(b and not a for a, b in zip(ours, base, strict=True))
    p, q = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    half = Z95 * math.sqrt((p + q - (p - q) ** 2) / (n + 2))
    return Interval((gained - lost) / n, max(-1.0, p - q - half), min(1.0, p - q + half))


@dataclass(frozen=True)
class Changes:
    """How many samples were right once but not now, and now but not before.

    ``p`` is that of McNemar's exact test: how likely is a split at least as uneven by chance.
    """

    lost: int
    gained: int
    p: float


def _all_or_nothing(rights: Sequence[Right]) -> bool:
    return all(right in (0, 1) for right in rights)


def _of_mean(values: Sequence[float], least: float) -> Interval:
    """Returns a mean with the normal approximation; values, and so it, are ``least`` to 1."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Interval(mean, least, 1.0)
    half = Z95 * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean, max(least, mean - half), min(1.0, mean + half))


def changes(ours: Sequence[Right], base: Sequence[Right]) -> Changes:
    """Returns what changed from ``base`` to ``ours`` on the same samples."""
    gained = sum(a > b for a, b in zip(ours, base, strict=True))
    lost = sum(a < b for a, b in zip(ours, base, strict=True))
    if not gained + lost:
        return Changes(0, 0, 1.0)
    test = need("scipy.stats", extra="eval").binomtest(gained, gained + lost)
    return Changes(lost, gained, float(test.pvalue))


def summarize(
    points: Sequence[Point], answers: Sequence[Answer], timings: Sequence[Timing]
) -> list[Summary]:
    """Returns the summary of each point that one task's rows answer, in the order of ``points``."""
    rows: dict[Point, dict[int, Answer]] = {}
    for row in answers:
        rows.setdefault(row.point, {})[row.sample] = row
    times: dict[Point, list[float]] = {}
    for timing in timings:
        times.setdefault(timing.point, []).append(timing.ms / timing.size)
    base = rows.get(CEILING, {})
    return [_summary(p, rows[p], base, times.get(p, [])) for p in points if p in rows]


def _summary(
    point: Point, rows: dict[int, Answer], base: dict[int, Answer], times: Sequence[float]
) -> Summary:
    paired = [i for i in rows if i in base]
    difference = None
    if paired and point != CEILING:
        ours = [rows[i].right for i in paired]
        difference = paired_difference(ours, [base[i].right for i in paired])
    return Summary(
        point.strategy,
        point.budget,
        len(rows),
        mean_right([row.right for row in rows.values()]),
        difference,
        statistics.fmean(row.kept for row in rows.values()),
        _mean([row.flops for row in rows.values()]),
        statistics.median(times) if times else None,
        _per_kind(list(rows.values())),
        _mean([row.cache for row in rows.values()]),
    )


def _mean(shares: Sequence[float | None]) -> float | None:
    known = [share for share in shares if share is not None]
    return statistics.fmean(known) if len(known) == len(shares) else None


def _per_kind(rows: Sequence[Answer]) -> dict[str, float]:
    kinds = sorted({row.kind for row in rows})
    return {kind: statistics.fmean(row.right for row in rows if row.kind == kind) for kind in kinds}
