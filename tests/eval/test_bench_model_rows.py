"""The figures of a benchmark, from turns that are made up."""

from __future__ import annotations

import dataclasses

import pytest

from vtprune.eval.bench_model_output import RATIOS, TIMES, legend, markdown, ratios, times
from vtprune.eval.bench_model_rows import (
    PHASES,
    Group,
    Row,
    Spread,
    Timed,
    Turn,
    break_even,
    fit,
    rows_of,
)


def turn(scoring=0.0, compaction=0.0, prefill=0.0, whole=0.0, mib=None):
    ms = dict.fromkeys(PHASES, 1.0)
    given = {"scoring": scoring, "compaction": compaction, "prefill": prefill, "end_to_end": whole}
    return Turn(ms | given, mib)


def group():
    """Three rounds; 100 tokens, of which 40 stay; a prefill takes 10 ms and 2 per token."""
    unpruned = Timed("none", "100%", 100, 100)
    unpruned.turns += [turn(0, 0, 200, 400), turn(0, 0, 300, 500), turn(0, 0, 100, 600)]
    control = Timed("random", "40%", 100, 40, free=40)
    control.turns += [turn(1, 1, 90, 200), turn(1, 1, 90, 200), turn(1, 1, 90, 200)]
    ours = Timed("fastervlm", "40%", 100, 40, free=40)
    ours.turns += [turn(20, 4, 100, 300), turn(20, 4, 100, 100), turn(25, 5, 120, 400)]
    every = Timed("shortv", "100%", 100, 100)
    every.turns += [turn(0, 0, 150, 300)] * 3
    free = {100: [200.0, 210.0, 220.0], 70: [150.0] * 3, 40: [100.0, 90.0, 50.0]}
    return Group(2, "336x336", [unpruned, control, ours, every], free)


def test_a_spread_is_median_and_quantiles():
    found = Spread.of([5.0, 1.0, 4.0, 2.0, 3.0])
    assert dataclasses.astuple(found) == pytest.approx((3, 1.8, 4.2))


def test_ratios_are_medians_of_those_within_a_round():
    rows = {row.strategy: row for row in rows_of(group())}
    ours = rows["fastervlm"]
    assert ours.over_free == pytest.approx(124 / 90)  # of 1.24, 1.38 and 3
    assert ours.over_unpruned == pytest.approx(2 / 3)  # of 0.75, 0.2 and 0.67
    assert ours.over_random == pytest.approx(1.5)  # of 1.5, 0.5 and 2
    assert ours.scoring_share == pytest.approx(0.1)  # of 0.1, 0.067 and 0.25
    assert (ours.kept, ours.visual_tokens, ours.batch) == (40, 100, 2)
    assert ours.phases["scoring"].median == 20 and ours.peak_mib is None


def test_ratios_pair_the_rounds():
    made = group()
    made.free[40] = [62.0, 124.0, 50.0]
    (row,) = [row for row in rows_of(made) if row.strategy == "fastervlm"]
    assert row.over_free == pytest.approx(2.0)  # of 2, 1 and 3; medians alone give 1.98


def test_where_nothing_leaves_nothing_is_said_of_it():
    none, _, _, every = rows_of(group())
    assert none.over_unpruned is none.scoring_share is none.over_free is none.break_even is None
    assert every.over_unpruned == pytest.approx(0.6) and every.scoring_share == 0
    assert every.over_free is every.over_random is every.break_even is None


def test_without_a_control_at_that_budget_nothing_is_compared():
    made = group()
    made.settings[1].budget = "25%"
    assert [row.over_random for row in rows_of(made)] == [None, 1.0, None, None]


def test_the_peak_is_the_highest_of_all_rounds():
    made = group()
    made.settings[1].turns[:] = [turn(prefill=1, whole=1, mib=m) for m in (3.0, 9.0, 5.0)]
    assert rows_of(made)[1].peak_mib == 9


@pytest.mark.parametrize("curve", [(10, 2, 0), (10, 0.5, 0.003), (0, 0, 0.01)])
def test_the_fit_finds_the_curve(curve):
    a, b, c = curve
    lengths = (576, 432, 288, 144, 64)
    found = fit({n: a + b * n + c * n * n for n in lengths})
    assert found == pytest.approx(curve, abs=1e-6)


def test_a_fit_never_falls_and_needs_two_lengths():
    assert fit({100: 5.0}) is None and fit({}) is None
    a, b, c = fit({100: 5.0, 50: 6.0, 10: 7.0}) or (0, 0, 0)
    assert (b, c) == (0, 0) and a == pytest.approx(6)
    a, b, c = fit({100: 210.0, 50: 110.0}) or (0, 0, 0)
    assert a + 100 * b + 10000 * c == pytest.approx(210)
    assert a + 50 * b + 2500 * c == pytest.approx(110)


@pytest.mark.parametrize(
    ("curve", "cost", "gone"),
    [
        ((10, 2, 0), 24, 12),
        ((10, 2, 0), 24.1, 13),
        ((10, 2, 0), 0, 0),
        ((10, 2, 0), 200, 100),
        ((10, 2, 0), 200.1, None),
        ((10, 0, 0), 1, None),
        ((0, 0, 1), 199, 1),  # 100^2 - 99^2
        (None, 1, None),
    ],
)
def test_the_break_even_count(curve, cost, gone):
    assert break_even(curve, 100, cost) == gone


def test_the_break_even_of_a_row_is_that_of_the_fit():
    """200 ms for 100 tokens, 150 for 70, 90 for 40: about 2 ms a token, so 24 ms are 12 to 14."""
    (row,) = [row for row in rows_of(group()) if row.strategy == "fastervlm"]
    assert row.break_even in (12, 13, 14)


def test_every_column_has_a_cell_and_a_meaning():
    rows = rows_of(group())
    for row in rows:
        assert len(times(row)) == len(TIMES) and len(ratios(row)) == len(RATIOS)
    names = [name.replace("-\n", "-").replace("\n", " ") for name in (*TIMES, *RATIOS)]
    said = [line.partition(":")[0] for line in legend()]
    assert set(names) <= set(said)
    settings = {
        "versions": {"torch": "2"},
        "random_weights": True,
        "parameters": 3e8,
        "left_out": ["all of it: too much"],
        **dict.fromkeys(("command", "model", "dtype", "attention", "device", "commit"), "some"),
        **dict.fromkeys(("words", "decode_tokens", "rounds"), 3),
    }
    text = markdown(rows, settings)
    assert "| fastervlm | 40% | 40 | 1 | 20 | 4 | 100 | 1 | 300 |  |" in text
    assert "| fastervlm | 40% | 0.667 | 1.500 | 1.378 | 10.00 | " in text
    assert "all of it: too much" in text and "300 M parameters" in text
    assert all(f"- {name}: " in text for name in names if name not in ("strategy", "budget"))


def test_rows_have_what_a_report_reads():
    names = [field.name for field in dataclasses.fields(Row)]
    wanted = "strategy budget batch resolution visual_tokens kept phases peak_mib over_free"
    assert set(f"{wanted} scoring_share break_even".split()) <= set(names)
