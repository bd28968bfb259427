"""Published counts as they are, on other towers, for other budgets; and stages of one share."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

import vtprune
from vtprune.scoring.rates import PUBLISHED, Rates, thinned


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_tower_of_the_authors_leaves_what_they_publish(name: str) -> None:
    rates, n = PUBLISHED[name], 196
    for i, (pruned, left) in enumerate(zip(rates.prune, rates.merge, strict=True)):
        k = rates.count(196, 2, (i + 1) / 12)
        assert k + 1 == left
        assert n - round((n - k) * rates.pruned(i / 12, (i + 1) / 12)) + 1 == pruned
        n = k


def test_half_the_depth_leaves_what_every_second_block_does() -> None:
    rates = PUBLISHED["deit_s_2.3"]
    assert [rates.count(196, 2, i / 6) + 1 for i in range(1, 7)] == [180, 127, 98, 66, 37, 3]
    pruned = (197 - 197 + 197 - 192) / (197 - 180)  # of the first two blocks
    assert math.isclose(rates.pruned(0, 1 / 6), pruned)
    assert math.isclose(rates.left(1 / 24), (1 + rates.left(1 / 12)) / 2)


@given(st.integers(2, 700), st.integers(1, 40), st.data())
def test_counts_fall_to_what_is_asked(n: int, depth: int, data: st.DataObject) -> None:
    k, name = data.draw(st.integers(1, n)), data.draw(st.sampled_from(sorted(PUBLISHED)))
    counts = [PUBLISHED[name].count(n, k, i / depth) for i in range(depth + 1)]
    assert counts[-1] == k
    assert counts[0] == (n if depth else k)
    assert counts == sorted(counts, reverse=True)
    for first, last in itertools.pairwise(i / depth for i in range(depth + 1)):
        assert -1e-9 <= PUBLISHED[name].pruned(first, last) <= 1 + 1e-9


def test_a_mild_budget_takes_the_power_that_the_last_block_but_one_needs() -> None:
    rates = PUBLISHED["deit_s_2.3"]  # whose last block but one leaves 30 of 196
    power = math.log(0.25) / math.log(30 / 196)
    assert rates.count(196, 49, 11 / 12) == 49
    assert rates.count(196, 49, 6 / 12) == round(196 * (97 / 196) ** power) == 117
    assert Rates((9,), (5,), 9).count(8, 2, 0.5) == 6  # one block: no power
    assert Rates((9, 9), (9, 5), 9).power(0.5) == 1.0


@pytest.mark.parametrize(
    ("prune", "merge", "tokens"),
    [
        ((5,), (6,), 9),
        ((10,), (6,), 9),
        ((5, 4), (5,), 9),
        ((), (), 9),
        ((5,), (1,), 9),
        ((5.0,), (4,), 9),
        ((True,), (True,), 9),
    ],
)
def test_lists_that_are_none_are_refused(prune: tuple, merge: tuple, tokens: int) -> None:
    with pytest.raises(vtprune.ConfigError, match="two lists of one length"):
        Rates(prune, merge, tokens)


@pytest.mark.parametrize(
    ("n", "k", "stages", "new", "left"),
    [
        (196, 71, 3, 1, [139, 99, 71]),  # the share 0.7 of the authors of EViT
        (196, 137, 1, 0, [137]),
        (100, 25, 2, 0, [49, 25]),
        (196, 1, 3, 1, [2, 2, 1]),
        (9, 9, 3, 1, [9, 9, 9]),
    ],
)
def test_stages_of_one_share(n: int, k: int, stages: int, new: int, left: list[int]) -> None:
    assert thinned(n, k, stages, new) == left


@given(st.integers(1, 700), st.integers(1, 12), st.booleans(), st.data())
def test_stages_of_one_share_end_at_what_is_asked(
    n: int, stages: int, new: bool, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, n))
    counts = thinned(n, k, stages, int(new))
    assert counts[-1] == k
    assert [n, *counts] == sorted([n, *counts], reverse=True)
