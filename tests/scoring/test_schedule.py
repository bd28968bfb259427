"""Ratios that follow from a mean over layers, and the counts that follow from them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vtprune.errors import ConfigError, InputError
from vtprune.scoring.schedule import Part, check_mean, scaled, staged_counts
from vtprune.types import Budget, Facts, Inside, Signals

LLAVA = Facts(24, 22, True, Facts.signals_of(cls_row=True), n_tokens=576, decoder_layers=32)


@given(
    ratios=st.lists(st.floats(0.01, 0.99), min_size=3, max_size=3, unique=True),
    keep=st.floats(0.26, 1.0),
)
def test_the_mean_over_layers_is_what_was_asked_for(ratios, keep):
    ratios.sort(reverse=True)
    left = scaled(ratios, (8, 12, 20), 32, keep)
    assert (8 + 4 * left[0] + 8 * left[1] + 12 * left[2]) / 32 == pytest.approx(keep, abs=1e-9)
    assert list(left) == sorted(left, reverse=True)


def test_ratios_keep_their_proportion_as_powers():
    assert scaled((0.5, 0.25, 0.125), (8, 16, 24), 32, 0.46875) == pytest.approx((0.5, 0.25, 0.125))
    one, two = scaled((0.5, 0.25), (8, 16), 32, 0.6)
    assert two == pytest.approx(one * one)
    assert scaled((0.5, 0.25), (8, 16), 32, 1.0) == (1.0, 1.0)
    assert scaled((0.5, 0.25), (8, 16), 32, 0.25) == pytest.approx((0.0, 0.0), abs=1e-6)


def test_counts_are_of_what_entered_and_at_least_one():
    inside = Inside(1, (8, 16, 24), 32, (576, 100, 2))
    signals = Signals(torch.zeros(3, 288, 1), inside=inside)
    ratios = (0.5, 0.25, 0.125)
    assert staged_counts(signals, Budget(fraction=0.46875), ratios, "it") == [144, 25, 1]
    assert staged_counts(signals, Budget(tokens=270), ratios, "it") == [144, 100, 2]
    few = replace(signals, tokens=torch.zeros(3, 20, 1))
    assert staged_counts(few, Budget(fraction=0.46875), ratios, "it") == [20, 20, 1]
    with pytest.raises(InputError, match=r"it counts by layers; signals\.inside says where"):
        staged_counts(replace(signals, inside=None), Budget(tokens=2), ratios, "it")


@pytest.mark.parametrize("budget", [Budget(tokens=144), Budget(fraction=0.25)])
def test_a_mean_below_what_the_first_layers_get_is_refused(budget):
    check_mean(Budget(tokens=145), 8, LLAVA, "it")
    check_mean(Budget(tokens=3), 8, replace(LLAVA, n_tokens=None), "it")
    with pytest.raises(ConfigError, match=r"out of reach of it: all tokens enter the first 8 of"):
        check_mean(budget, 8, LLAVA, "it")


RATIOS = (1.0, 0.735, 0.735**2, 0.735**3)


@given(
    ratios=st.lists(st.floats(0.05, 1.0), min_size=4, max_size=4),
    keep=st.floats(0.01, 1.0),
)
def test_parts_have_the_mean_that_was_asked_for(ratios, keep):
    layers = (8, 12, 20)
    left = [Part(tuple(ratios), layers, 32, stage)(keep) for stage in range(4)]
    assert (8 * left[0] + 4 * left[1] + 8 * left[2] + 12 * left[3]) / 32 == pytest.approx(keep)
    below = [(share, ratio) for share, ratio in zip(left, ratios, strict=True) if share < 1]
    assert len({round(share / ratio, 6) for share, ratio in below}) <= 1  # in proportion


def test_a_part_of_a_budget_is_of_the_share_that_it_is():
    part = Budget.of(32).times(Part(RATIOS, (8, 16, 24), 32, 0))
    assert (part.tokens, part.count(576), part.count(40), part.count(32)) == (32, 48, 40, 32)
    assert Budget.of(0.25).times(Part(RATIOS, (8, 16, 24), 32, 3)).count(100) == 15
    assert [b.tokens for b in part.split([288, 288])] == [24, 24]
