"""TransPrune: where it acts, what it reads there, and the ranking."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import vtprune
from tests import tiny
from vtprune.errors import ConfigError
from vtprune.registry import build
from vtprune.types import Budget, Facts, Inside, Signals, TextRows, Transition

LLAVA = Facts(24, 22, True, Facts.signals_of(cls_row=True), n_tokens=576, decoder_layers=32)
AUTHORS = (7, 9, 12)


def test_it_sums_up_from_the_layer_before_its_first_stage():
    stages = build("transprune").plan(LLAVA)
    assert [stage.layer for stage in stages] == [7, 9, 12]
    assert stages[0].needs == (Transition(6), TextRows(7))
    assert stages[2].needs == (*map(Transition, range(6, 12)), TextRows(12))
    (bare, *_) = build("transprune", instruction=False, abs_cos=True).plan(LLAVA)
    assert bare.needs == (Transition(6, abs_cos=True),)
    qwen = replace(LLAVA, decoder_layers=28)
    assert [stage.layer for stage in build("transprune").plan(qwen)] == [6, 8, 10]


@pytest.mark.parametrize(
    ("ratios", "keep", "wanted"),
    [
        ((0.875, 0.625, 0.125), 13.125 / 32, [504, 360, 72]),
        ((0.65, 0.25, 0.05), 10.05 / 32, [374, 144, 28]),
        ((0.875, 0.625, 0.125), 1.0, [576, 576, 576]),
    ],
)
def test_the_authors_counts(ratios, keep, wanted):
    strategy = build("transprune", ratios=ratios)
    found = []
    for stage in range(3):
        inside = Inside(stage, AUTHORS, 32, (576,))
        signals = Signals(torch.zeros(1, 576, 1), inside=inside)
        found += strategy.counts(signals, Budget.of(keep))
    assert found == wanted


def test_fewer_layers_take_the_last_ratios():
    strategy = build("transprune", ratios=(0.9, 0.5))
    signals = Signals(torch.zeros(1, 100, 1), inside=Inside(0, (16,), 32, (100,)))
    assert strategy.counts(signals, Budget.of(0.75)) == [50]
    shallow = replace(LLAVA, decoder_layers=4)
    assert [stage.layer for stage in build("transprune").plan(shallow)] == [1, 2]


def test_two_layers_take_the_last_two_of_three():
    found = []
    for stage in range(2):
        where = Inside(stage, (8, 16), 32, (100,))
        signals = Signals(torch.zeros(1, 100, 1), inside=where)
        found += build("transprune").counts(signals, Budget.of(15 / 32))
    assert found == [62, 12]  # (8 + 8 * 0.625 + 16 * 0.125) / 32


def test_both_terms_are_shares_of_what_is_there():
    moved = {Transition(6): torch.tensor([[1.0, 2.0, 1.0]]), Transition(7): torch.ones(1, 3)}
    words = torch.tensor([[0.3, 0.0, 0.1]])
    signals = Signals(torch.zeros(1, 3, 1), values={**moved, TextRows(8): words})
    score = build("transprune").score(signals)
    wanted = (torch.tensor([[2.0, 3.0, 2.0]]) / 7 + words / 0.4) / 2
    torch.testing.assert_close(score, wanted)
    only = build("transprune", alpha=0.0).score(signals)
    torch.testing.assert_close(only, words / 0.4)
    bare = build("transprune", instruction=False).score(replace(signals, values=moved))
    torch.testing.assert_close(bare, torch.tensor([[2.0, 3.0, 2.0]]) / 7)
    moved[Transition(7)][0, 1] = float("nan")
    assert build("transprune", instruction=False).select(signals, 2).rows.tolist() == [[0, 2]]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"ratios": ()}, r"ratios=\(\) must fall"),
        ({"ratios": (0.5, 0.5)}, "must fall, from below 1 to above 0"),
        ({"ratios": (1.0, 0.5)}, "must fall"),
        ({"ratios": (0.5, 0.0)}, "must fall"),
        ({"alpha": 1.5}, "alpha=1.5 must be from 0 to 1"),
        ({"alpha": float("nan")}, "alpha=nan must be"),
    ],
)
def test_options_out_of_range(options, match):
    with pytest.raises(ConfigError, match=match):
        build("transprune", **options)


def test_as_many_ratios_as_layers():
    with pytest.raises(ConfigError, match=r"layers=\(1, 2, 3, 4\) need as many ratios"):
        build("transprune", layers=(1, 2, 3, 4)).plan(LLAVA)


def test_the_mean_over_layers_is_kept_in_a_model():
    model = tiny.build()
    with vtprune.wrap(model, "transprune", keep=0.6) as handle:
        model(**tiny.one_image())
        stages = handle.report().stages
    (first, second), depth = stages, 4
    assert (first.layer, second.layer) == (1, 2)
    mean = (tiny.N + first.kept + 2 * second.kept) / depth
    assert 0.6 * tiny.N - 1 < mean <= 0.6 * tiny.N
