"""The search and the test on made-up answers, of which the truth is known."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from vtprune.errors import ConfigError
from vtprune.eval.budgets import Point
from vtprune.eval.tune_search import (
    FINALISTS,
    MaxDrop,
    MaxMs,
    Seen,
    better,
    chain,
    confirm,
    search,
    sizes,
)
from vtprune.eval.tune_stats import Paired

BATCH = 16


class World:
    """Settings by name: share of answers lost, share gained, FLOPs; unpruned is right at 94 %.

    ``looks`` has what was asked for: points, first and end.
    """

    def __init__(self, truths, n, seed=0):
        self.truths = {Point(name, "50%"): truth for name, truth in truths.items()}
        rng = np.random.default_rng(seed)
        self.base = np.asarray(rng.random(n) < 0.94)
        self.right = {}
        for point, (lost, gained, _) in self.truths.items():
            draw = rng.random(n)
            self.right[point] = np.where(self.base, draw >= lost / 0.94, draw < gained / 0.06)
        self.looks = []

    @property
    def points(self):
        return list(self.truths)

    def drop(self, point):
        lost, gained, _ = self.truths[point]
        return lost - gained

    def __call__(self, points, first, end):
        self.looks.append((tuple(points), first, end))
        base, found = self.base[first:end], []
        for point in points:
            ours = self.right[point][first:end]
            paired = Paired(end - first, int((base & ~ours).sum()), int((ours & ~base).sum()))
            flops = self.truths[point][2]
            n = (end - first) // BATCH
            found.append(
                Seen(point, paired, int(ours.sum()), flops, (20 * flops,) * n, (20.0,) * n)
            )
        return found


def tuned(world, goal, samples, limit):
    """What a run finds: the settings tested, and whether each holds."""
    found = search(world.points, world, goal, samples, BATCH, limit - samples)
    return confirm(found, world, goal, samples, limit)


LADDER = {
    f"{name}{i}": (lost, 0.005, flops)
    for name, safe in (("a", 0.0), ("b", 0.03))
    for i, (lost, flops) in enumerate(
        ((0.006 + safe, 0.75), (0.01 + safe, 0.5), (0.06 + safe, 0.25), (0.2 + safe, 0.1))
    )
}


@pytest.mark.parametrize("seed", range(3))
def test_the_cheapest_that_holds_is_found(seed):
    world = World(LADDER, 2400, seed)
    goal = MaxDrop(0.02, 0.95)
    tested = tuned(world, goal, 800, 2400)
    assert [(seen.point.strategy, holds) for seen, holds in tested if holds][-1] == ("a1", True)
    for seen, holds in tested:
        assert holds == goal.holds(seen)
        assert seen.paired.n == 1600


def test_the_test_sees_no_sample_of_the_search():
    world = World(LADDER, 1200)
    tested = tuned(world, MaxDrop(0.03, 0.95), 400, 1200)
    searched = [look for look in world.looks if look[1] == 0]
    assert [end for _, _, end in searched] == [400]  # eight settings: one round
    assert world.looks[len(searched) :] == [((seen.point,), 400, 1200) for seen, _ in tested]


def test_each_round_measures_half_as_many_on_twice_as_many():
    world = World({f"s{i}": (0.01 * i, 0.0, 1 - 0.02 * i) for i in range(30)}, 480)
    told = []
    search(world.points, world, MaxDrop(0.02, 0.95), 480, BATCH, 960, told.append)
    assert [(len(points), end) for points, _, end in world.looks] == [
        (30, 128),
        (15, 240),
        (8, 480),
    ]
    assert [(one.measured, one.stay) for one in told] == [(30, 15), (15, 8), (8, FINALISTS)]
    assert all(one.best.paired.n == end for one, (_, _, end) in zip(told, world.looks, strict=True))


@pytest.mark.parametrize("n", [1, 4, 5, 8, 9, 60, 200])
@pytest.mark.parametrize("samples", [16, 48, 496])
def test_rounds_are_whole_batches_and_end_with_few(n, samples):
    found = sizes(n, samples, BATCH)
    assert found[-1] == (min(n, FINALISTS), samples)
    assert all(size % BATCH == 0 and BATCH <= size <= samples for _, size in found)
    assert len(found) == max(1, math.ceil(math.log2(n / FINALISTS)))
    entered = pairwise([n, *(stay for stay, _ in found)])
    assert all(after == max(min(n, FINALISTS), -(-before // 2)) for before, after in entered)


def error_rate(truths, goal, samples, limit, runs):
    """How often the setting returned breaks the bound, and how often one is returned at all."""
    wrong = some = 0
    for seed in range(runs):
        world = World(truths, limit, seed)
        held = [seen for seen, holds in tuned(world, goal, samples, limit) if holds]
        some += bool(held)
        wrong += bool(held) and world.drop(held[-1].point) >= goal.bound - 1e-9
    return wrong / runs, some / runs


ALL_AT_THE_BOUND = {f"s{i}": (0.04, 0.01, 0.9 - 0.07 * i) for i in range(12)}
SOME_BEYOND = {
    **{f"s{i}": (0.012, 0.01, 0.9 - 0.05 * i) for i in range(4)},
    **{f"t{i}": (0.042, 0.01, 0.6 - 0.05 * i) for i in range(8)},
}


@pytest.mark.slow
@pytest.mark.parametrize("truths", [ALL_AT_THE_BOUND, SOME_BEYOND], ids=["all at it", "some"])
def test_a_setting_that_breaks_the_bound_is_seldom_returned(truths):
    runs, confidence = 800, 0.95
    wrong, some = error_rate(truths, MaxDrop(0.03, confidence), 240, 720, runs)
    assert wrong <= 1 - confidence + 2.5 * math.sqrt(0.05 * 0.95 / runs)
    if truths is SOME_BEYOND:
        assert some > 0.9


def seen(name, flops=0.5, lost=0, gained=0, n=400, ms=(), right=380):
    return Seen(Point(name, "50%"), Paired(n, lost, gained), right, flops, tuple(ms), (20.0,) * 5)


def test_half_of_those_that_stay_are_the_likeliest():
    goal = MaxDrop(0.02, 0.95)
    safe = [seen(f"safe{i}", 0.97) for i in range(3)]
    bold = [seen(f"bold{i}", 0.1, lost=4) for i in range(3)]
    hopeless = seen("hopeless", 0.05, lost=40)
    names = [one.point.strategy for one in better([hopeless, *bold, *safe], 4, goal, 800)]
    assert names == ["safe0", "bold0", "safe1", "bold1"]


def test_the_safest_is_tested_first_then_ever_cheaper_ones():
    goal = MaxDrop(0.03, 0.95)
    given = [
        seen("cheap", 0.3, lost=6),
        seen("dear", 0.9, lost=7),  # neither cheaper nor safer than "middle"
        seen("safe", 0.8),
        seen("middle", 0.5, lost=3),
        seen("hopeless", 0.1, lost=100),
    ]
    assert [one.point.strategy for one in chain(given, goal, 800)] == ["safe", "middle", "cheap"]
    assert chain([seen("hopeless", 0.1, lost=100)], goal, 800)  # better than no test at all


def test_the_test_stops_at_the_first_that_fails():
    asked = []

    def look(points, first, end):
        asked.append(points[0].strategy)
        return [seen(points[0].strategy, lost=30 * (points[0].strategy == "bad"))]

    goal = MaxDrop(0.02, 0.95)
    tested = confirm([seen("good"), seen("bad"), seen("cheap")], look, goal, 400, 800)
    assert asked == ["good", "bad"]
    assert [holds for _, holds in tested] == [True, False]


def test_what_costs_more_than_unpruned_is_left_out():
    world = World({"a": (0.0, 0.0, 1.1), "b": (0.01, 0.0, 0.5)}, 160)
    found = search(world.points, world, MaxDrop(0.1, 0.95), 80, BATCH, 80)
    assert [one.point.strategy for one in found] == ["b"]
    world = World({"a": (0.0, 0.0, 1.0)}, 160)
    with pytest.raises(ConfigError, match="No setting is better than the unpruned model"):
        search(world.points, world, MaxDrop(0.1, 0.95), 80, BATCH, 80)


def test_cost_is_flops_or_time():
    one = seen("a", flops=0.3, ms=[10, 11, 30])
    assert MaxDrop(0.1, 0.95).worth(one) == pytest.approx(0.7)
    assert MaxDrop(0.1, 0.95, "ms").worth(one) == pytest.approx(1 - 11 / 20)
    with pytest.raises(ConfigError, match="Say --by ms"):
        MaxDrop(0.1, 0.95).worth(replace(one, flops=None))


def test_with_a_bound_of_time_the_most_accurate_is_found():
    truths = {
        "slow": (0.0, 0.0, 0.9),  # 18 ms
        "right": (0.02, 0.0, 0.5),  # 10 ms
        "fast": (0.2, 0.0, 0.2),  # 4 ms
    }
    tested = tuned(World(truths, 900), MaxMs(12.0, 0.95), 300, 900)
    assert [seen.point.strategy for seen, holds in tested if holds][-1] == "right"


def test_times_are_tested_by_signs():
    goal = MaxMs(12.0, 0.95)
    assert goal.holds(seen("a", ms=[12.0] * 5))  # 1 / 32
    assert not goal.holds(seen("a", ms=[1.0] * 4))  # 1 / 16
    assert not goal.holds(seen("a", ms=[1.0] * 9 + [13.0] * 4))
    assert goal.holds(seen("a", ms=[11.0] * 10 + [500.0] * 2))  # 79 / 4096
    fast, slow = seen("a", ms=[11.0] * 6), seen("b", ms=[13.0] * 6)
    assert goal.chance(fast, 0) == pytest.approx(1 - 1 / 128)
    assert goal.chance(slow, 0) == pytest.approx(1 / 128 * 12 / 13)


def test_too_few_samples_are_said_to_be_too_few():
    MaxDrop(0.01, 0.95).check(301, 0)
    with pytest.raises(ConfigError, match=r"that takes 301, .* So few can confirm 1.1 points at"):
        MaxDrop(0.01, 0.95).check(280, 0)
    MaxMs(3.0, 0.95).check(0, 5)
    with pytest.raises(ConfigError, match=r"4 whole batches .* takes 5"):
        MaxMs(3.0, 0.95).check(0, 4)
