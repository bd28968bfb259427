"""The test of a drop: its error is computed over all counts, and its parts against definitions."""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.stats import binom, multinomial

from vtprune.eval import tune_stats
from vtprune.eval.tune_stats import Paired, chance, confirms, least, needed, score, upper_limit


def region(n, bound, confidence, most):
    """By count gained, up to ``most``: the largest lost with which the bound is confirmed."""
    found, lost = [], -1
    for gained in range(most + 1):
        while confirms(Paired(n, lost + 1, gained), bound, confidence):
            lost += 1
        found.append(lost)
    return np.array(found)


def probability(limits, n, drop, share):
    """How probable counts within a region are, by the true drop and share gained."""
    gained = np.arange(len(limits))
    given = binom.cdf(limits, n - gained, (drop + share) / (1 - share))
    beyond = binom.sf(len(limits) - 1, n, share)
    return float((binom.pmf(gained, n, share) * given).sum() + beyond)


def error(n, bound, confidence):
    """The largest probability of confirming a bound that is not held, over shares gained."""
    shares = [0, 0.0005, *np.linspace(0.001, 0.03, 30), *np.linspace(0.035, 0.12, 18)]
    limits = region(n, bound, confidence, int(binom.ppf(1 - 1e-7, n, shares[-1])))
    assert limits[-1] >= 0  # something is confirmed at all
    return max(probability(limits, n, bound, share) for share in shares)


# 16 of 64 and 12 of 110 are where approximate intervals err most: 8 % for a stated 5 %.
@pytest.mark.parametrize(
    ("n", "bound", "confidence"),
    [(64, 0.1, 0.95), (110, 0.05, 0.95), (120, 0.03, 0.95), (80, 0.05, 0.8)],
)
def test_the_error_is_no_larger_than_stated(n, bound, confidence):
    assert 0.6 * (1 - confidence) < error(n, bound, confidence) <= 1 - confidence


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n", "bound", "confidence"),
    [(300, 0.02, 0.95), (320, 0.01, 0.95), (500, 0.03, 0.99), (1000, 0.01, 0.95)],
)
def test_the_error_is_no_larger_than_stated_with_many(n, bound, confidence):
    assert 0.6 * (1 - confidence) < error(n, bound, confidence) <= 1 - confidence


@pytest.mark.slow
def test_upper_limits_cover_the_drop():
    rng, n, covered = np.random.default_rng(0), 400, []
    for lost, gained in ((0.01, 0.005), (0.04, 0.02), (0.03, 0.03), (0.02, 0.05)):
        drawn = rng.multinomial(n, (lost, gained, 1 - lost - gained), size=1500)
        limits = [upper_limit(Paired(n, int(a), int(b)), 0.95) for a, b, _ in drawn]
        covered.append(np.mean(np.array(limits) >= lost - gained))
    assert min(covered) >= 0.95 - 2.5 * math.sqrt(0.05 * 0.95 / 1500)
    assert max(covered) < 0.985  # as narrow as it may be


def test_the_statistic_is_the_likeliest_under_the_drop():
    n, drop = 80, 0.07
    for lost, gained in ((0, 0), (1, 0), (3, 5), (9, 2), (20, 1)):

        def against(share, lost=lost, gained=gained):
            cells = (share + drop, share, 1 - drop - 2 * share)
            return -multinomial.logpmf((lost, gained, n - lost - gained), n, cells)

        share = cast(Any, minimize_scalar(against, bounds=(0, 0.46), method="bounded")).x
        wanted = (lost - gained - n * drop) / math.sqrt(n * (2 * share + drop - drop**2))
        assert score(np.array(lost), np.array(gained), n, drop) == pytest.approx(wanted, abs=1e-3)


def test_the_probability_is_that_of_all_counts_as_good():
    n, bound, seen = 25, 0.2, Paired(25, 2, 1)
    limit = score(np.array(2.0), np.array(1.0), n, bound)
    for share in (0.0, 0.03, 0.2):
        total = 0.0
        for lost in range(n + 1):
            for gained in range(n + 1 - lost):
                if score(np.array(float(lost)), np.array(float(gained)), n, bound) <= limit + 1e-9:
                    cells = (bound + share, share, 1 - bound - 2 * share)
                    total += multinomial.pmf((lost, gained, n - lost - gained), n, cells)
        found = tune_stats._as_good(seen, bound, np.array([share]))
        assert found[0] == pytest.approx(total, abs=1e-7)


def test_the_upper_limit_is_the_smallest_bound_confirmed():
    for paired in (Paired(300, 0, 0), Paired(300, 6, 2), Paired(40, 30, 1)):
        limit = upper_limit(paired, 0.95)
        assert paired.drop < limit < 1
        assert confirms(paired, limit, 0.95)
        assert not confirms(paired, limit - 2e-5, 0.95)
    assert upper_limit(Paired(300, 2, 20), 0.95) < 0  # shown to be better than unpruned
    assert upper_limit(Paired(20, 20, 0), 0.95) > 0.999


def test_more_lost_or_less_gained_or_fewer_samples_are_never_better():
    limits = [upper_limit(Paired(200, lost, 4), 0.95) for lost in (0, 1, 4, 12)]
    assert limits == sorted(limits)
    limits = [upper_limit(Paired(200, 4, gained), 0.95) for gained in (0, 1, 4, 12)]
    assert limits == sorted(limits, reverse=True)
    limits = [upper_limit(Paired(100 * k, 2 * k, k), 0.95) for k in (1, 2, 5)]
    assert limits == sorted(limits, reverse=True)


@pytest.mark.parametrize(("bound", "confidence"), [(0.01, 0.95), (0.05, 0.95), (0.03, 0.99)])
def test_the_least_number_of_samples(bound, confidence):
    n = least(bound, confidence)
    assert confirms(Paired(n, 0, 0), bound, confidence)
    assert not confirms(Paired(n - 1, 0, 0), bound, confidence)
    assert 1 <= n / (math.log(1 - confidence) / math.log(1 - bound)) < 1.15


def test_about_as_many_as_are_needed():
    assert needed(Paired(200, 4, 0), 0.02, 0.95) is None
    assert needed(Paired(200, 0, 0), 0.02, 0.95) == least(0.02, 0.95)
    for paired, bound in ((Paired(200, 4, 3), 0.03), (Paired(200, 2, 2), 0.04)):
        n, share = needed(paired, bound, 0.95), paired.gained / paired.n
        assert n is not None
        limits = region(n, bound, 0.95, int(binom.ppf(1 - 1e-7, n, share)))
        assert probability(limits, n, paired.drop, share) == pytest.approx(0.8, abs=0.04)


def test_the_chance_is_about_that_of_confirming():
    rng, fresh, bound = np.random.default_rng(0), 300, 0.04
    limits = region(fresh, bound, 0.95, 30)
    for paired in (Paired(200, 4, 3), Paired(200, 8, 3), Paired(64, 0, 0)):
        cells = (paired.lost + 1, paired.gained + 1, paired.n - paired.lost - paired.gained + 1)
        lost, gained, _ = rng.dirichlet(cells, size=200).T
        pairs = zip(lost, gained, strict=True)
        wanted = np.mean([probability(limits, fresh, a - b, b) for a, b in pairs])
        assert chance(paired, bound, 0.95, fresh) == pytest.approx(wanted, abs=0.1)
