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


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Summary:
    """One point: shares in 0 to 1, mean visual tokens kept, milliseconds (None = not timed).

    ``flops`` is the mean share of the unpruned prefill (None = not known).
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


def accuracy(right: int, n: int) -> Interval:
    """Returns the share ``right / n`` with the Wilson interval."""
    test = need("scipy.stats", extra="eval").binomtest(right, n)
    low, high = test.proportion_ci(method="wilson")
    return Interval(right / n, float(low), float(high))


def paired_difference(ours: Sequence[bool], base: Sequence[bool]) -> Interval:
    """Returns mean(ours) - mean(base) over the same samples.

    The interval is the normal approximation for paired shares with one sample added to each kind
    of change, gained and lost (Bonett and Price 2012), so it has a width even where none changed.
    """
    n = len(ours)
    gained = sum(a and not b for a, b in zip(ours, base, strict=True))
    lost = sum(b and not a for a, b in zip(ours, base, strict=True))
    p, q = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    half = Z95 * math.sqrt((p + q - (p - q) ** 2) / (n + 2))
    return Interval((gained - lost) / n, max(-1.0, p - q - half), min(1.0, p - q + half))


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
        accuracy(sum(row.right for row in rows.values()), len(rows)),
        difference,
        statistics.fmean(row.kept for row in rows.values()),
        _mean([row.flops for row in rows.values()]),
        statistics.median(times) if times else None,
        _per_kind(list(rows.values())),
    )


def _mean(shares: Sequence[float | None]) -> float | None:
    known = [share for share in shares if share is not None]
    return statistics.fmean(known) if len(known) == len(shares) else None


def _per_kind(rows: Sequence[Answer]) -> dict[str, float]:
    kinds = sorted({row.kind for row in rows})
    return {kind: statistics.fmean(row.right for row in rows if row.kind == kind) for kind in kinds}
