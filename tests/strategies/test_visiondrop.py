"""VisionDrop: the counts of its stages, and which of their tokens are merged ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import vtprune
from vtprune.errors import ConfigError
from vtprune.registry import build
from vtprune.types import (
    Budget,
    ClsRow,
    Facts,
    Inside,
    Keys,
    LayerKeys,
    Signals,
    Site,
    VisualRows,
)

LLAVA = Facts(24, 22, True, Facts.signals_of(cls_row=True), n_tokens=576, decoder_layers=32)


@pytest.mark.parametrize(
    ("keep", "left"),
    [
        (32, [48, 35, 26, 19]),  # the released setting
        (64, [96, 70, 52, 38]),
        (128, [192, 141, 104, 76]),
        (0.25, [216, 158, 116, 86]),
        (400, [576, 450, 331, 243]),  # where the first stage has all, the others make up for it
        (1.0, [576] * 4),
    ],
)
def test_the_mean_over_layers_is_what_was_asked(keep, left):
    stages = build("visiondrop").plan(LLAVA)
    assert [stage.layer for stage in stages] == [None, 8, 16, 24]
    assert [stage.site for stage in stages] == [Site.ENCODER] + [Site.DECODER] * 3
    budgets = [Budget.of(keep).times(stage.times) for stage in stages]
    assert [budget.count(576) for budget in budgets] == left
    assert sum(left) / 4 == pytest.approx(Budget.of(keep).count(576), abs=0.5)


def test_counts_inside_are_of_all_images_of_a_sample():
    strategy = build("visiondrop")
    last = Budget.of(32).times(strategy.plan(LLAVA)[3].times)
    inside = Inside(2, (8, 16, 24), 32, (60, 30), images=((576, 576), (576,)))
    signals = Signals(torch.zeros(2, 30, 1), inside=inside)
    assert strategy.counts(signals, last) == [30, 19]


@pytest.mark.parametrize(
    ("facts", "layers", "site"),
    [
        (replace(LLAVA, decoder_layers=0), [None], Site.ENCODER),
        (replace(LLAVA, decoder_layers=28, in_tower=False), [None, 7, 14, 21], Site.PROJECTOR),
        (replace(LLAVA, decoder_layers=4, first_stage=3), [None, 3], Site.ENCODER),
    ],
)
def test_other_models(facts, layers, site):
    stages = build("visiondrop").plan(facts)
    assert [stage.layer for stage in stages] == layers
    assert stages[0].site is site
    left = [Budget.of(100).times(stage.times).count(1000) for stage in stages]
    ends = [0, *layers[1:], max(1, facts.decoder_layers)]
    mean = sum(n * (b - a) for n, a, b in zip(left, ends, ends[1:], strict=False)) / ends[-1]
    assert mean == pytest.approx(100, abs=0.5)


def test_an_eighth_of_the_first_stage_and_a_seventh_of_the_others_are_merged():
    generator = torch.Generator().manual_seed(0)
    tokens, keys = torch.randn(1, 100, 4, generator=generator), torch.randn(1, 100, 3)
    score = torch.arange(100.0)[None]
    tower = Signals(tokens, values={ClsRow(22): score, Keys(22): keys}, n_prefix=1)
    rows = vtprune.select("visiondrop", keep=48, signals=tower).rows[0].tolist()
    assert rows[:42] == [-1, *range(59, 100)]
    assert max(rows[42:]) < 59
    inside = Inside(1, (8, 16, 24), 32, (100,), images=((576,),))
    values = {VisualRows(16): score, LayerKeys(16): keys}
    later = Signals(tokens, values=values, inside=inside)
    rows = vtprune.select("visiondrop", keep=26, signals=later).rows[0].tolist()
    assert rows[:22] == list(range(78, 100))
    assert max(rows[22:]) < 78
    explicit = build("visiondrop", contextual=(0, 0, 9, 0), merge="mean")
    rows = vtprune.select(explicit, keep=26, signals=later).rows[0].tolist()
    assert rows[:17] == list(range(83, 100))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratios": (1.0, 0.5)}, "four numbers"),
        ({"ratios": (1.0, 0.5, 0.0, 0.1)}, "four numbers"),
        ({"contextual": (1, 2, 3)}, "four counts"),
        ({"contextual": (1, 2, 3, -1)}, "four counts"),
        ({"merge": "sum"}, "merge='sum' is unknown; choose 'add' or 'mean'"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        build("visiondrop", **options)
