from __future__ import annotations

from dataclasses import replace

import pytest

from vtprune.eval.budgets import CEILING, FLOOR, Point
from vtprune.eval.results import Answer, Timing
from vtprune.eval.stats import accuracy, paired_difference, summarize

RANDOM = Point("random", "25%")


def test_wilson_interval_against_published_values():
    # Newcombe (1998), Table I, method 3: 81/263, 15/148, 0/20, 1/29.
    for right, n, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        found = accuracy(right, n)
        assert found.value == right / n
        assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)


def test_paired_difference_by_hand():
    ours = [True] * 4 + [False] * 6
    base = [True] * 3 + [False] + [True] * 3 + [False] * 3  # 1 gained, 3 lost of 10
    found = paired_difference(ours, base)
    assert found.value == pytest.approx(-0.2)
    # p = 2/12, q = 4/12: -1/6 -+ 1.96 sqrt((1/2 - 1/36) / 12)
    assert (found.low, found.high) == pytest.approx((-0.55544, 0.22211), abs=1e-4)


def test_paired_difference_has_a_width_when_nothing_changed():
    found = paired_difference([True] * 20, [True] * 20)
    assert found.value == 0
    assert found.low == pytest.approx(-found.high)
    assert 0.05 < found.high < 0.2


def rows(point, rights, kept=64):
    return [
        Answer(
            "scenes",
            i,
            "read" if i % 2 else "count",
            *_names(point),
            "q",
            "a",
            "a",
            right,
            256,
            kept,
        )
        for i, right in enumerate(rights)
    ]


def _names(point):
    return point.strategy, point.budget


def test_summary_pairs_by_sample():
    answers = rows(CEILING, [True, True, True, False], 256) + rows(RANDOM, [True, False], 64)
    timings = [
        Timing("scenes", *_names(RANDOM), first, 2, ms) for first, ms in ((0, 10.0), (2, 30.0))
    ]
    ceiling, random = summarize([CEILING, FLOOR, RANDOM], answers, timings)
    assert (ceiling.n, ceiling.accuracy.value, ceiling.kept) == (4, 0.75, 256)
    assert ceiling.difference is None
    assert ceiling.ms is None
    assert (random.n, random.accuracy.value, random.kept) == (2, 0.5, 64)
    assert random.difference is not None
    assert random.difference.value == -0.5
    assert random.ms == 10.0
    assert random.kinds == {"count": 1.0, "read": 0.0}
    assert (ceiling.flops, random.flops) == (None, None)


def test_a_share_of_flops_is_a_mean_where_every_row_has_one():
    answers = rows(RANDOM, [True, False, True], 64)
    shares = [
        replace(row, flops=share) for row, share in zip(answers, (0.2, 0.3, 0.4), strict=True)
    ]
    assert summarize([RANDOM], shares, [])[0].flops == pytest.approx(0.3)
    assert summarize([RANDOM], [*shares[:2], answers[2]], [])[0].flops is None
