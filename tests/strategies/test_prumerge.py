"""PruMerge and PruMerge+: counts, order, layers and what is merged."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import vtprune
from tests import tiny
from vtprune.engine.plan import find_adapter
from vtprune.errors import ConfigError
from vtprune.registry import build
from vtprune.types import Facts, Received, Signals, Site, WideClsRow, WideKeys

NAMES = ["prumerge", "prumerge_plus"]


def signals_of(score: Tensor) -> Signals:
    """Random tokens and keys with these scores ``[B, N]``."""
    generator = torch.Generator().manual_seed(0)
    tokens, keys = (torch.randn(*score.shape, d, generator=generator) for d in (6, 8))
    return Signals(tokens, values={WideClsRow(3): score, WideKeys(3): keys})


def peaks(*counts: int, n: int = 64) -> Tensor:
    """Per row that many outliers, on the first patches and falling, and low scores elsewhere."""
    score = torch.linspace(0.01, 0.011, n).repeat(len(counts), 1)
    for row, count in zip(score, counts, strict=True):
        row[:count] += torch.linspace(1.0, 0.5, count)
    return score


def test_outputs_come_by_falling_attention_and_end_with_what_left():
    score = torch.rand(1, 64, generator=torch.Generator().manual_seed(1))
    selection = vtprune.select("prumerge", keep=9, signals=signals_of(score))
    assert selection.rows[0].tolist() == [*score[0].topk(8).indices.tolist(), -1]


def test_a_quarter_by_attention_and_the_others_on_a_grid():
    signals = signals_of(peaks(3))
    rows = vtprune.select("prumerge_plus", keep=13, signals=signals).rows[0].tolist()
    # 61 patches are left from 3 on, of which every 61 / 9 th.
    assert rows == [0, 1, 2, 3, 9, 16, 23, 30, 36, 43, 50, 57, -1]


def test_as_many_as_outliers():
    signals = signals_of(peaks(5, 8))
    strategy = build("prumerge", adaptive=True)
    assert strategy.counts(signals, vtprune.Budget.of(1.0)) == [6, 9]
    assert strategy.counts(signals, vtprune.Budget.of(7)) == [6, 7]
    every = build("prumerge", adaptive=True, compat=True)
    assert every.counts(signals, vtprune.Budget.of(1.0)) == [7, 7]  # int(64 * 13 / 128)
    assert strategy.counts(signals_of(torch.ones(1, 64)), vtprune.Budget.of(1.0)) == [2]


def test_the_stride_follows_from_the_outliers():
    signals = signals_of(peaks(2, 5))
    strategy = build("prumerge_plus", adaptive=True)
    # Strides int(int(64 / 2) / 3) = 10 and int(int(64 / 5) / 3) = 4, positions below 63.
    assert strategy.counts(signals, vtprune.Budget.of(1.0)) == [9, 20]
    first, second = (signals.rows(torch.tensor([b])) for b in (0, 1))
    rows = vtprune.select(strategy, keep=1.0, signals=first).rows[0].tolist()
    assert rows == [0, 1, 10, 20, 30, 40, 50, 60, -1]
    rows = vtprune.select(strategy, keep=1.0, signals=second).rows[0].tolist()
    assert rows == [0, 1, 2, 3, 4, *range(8, 63, 4), -1]


def test_where_the_budget_cuts_the_grid_it_still_spans_the_image():
    signals = signals_of(peaks(5))
    bounded = vtprune.select("prumerge_plus", keep=13, signals=signals, adaptive=True)
    exact = vtprune.select("prumerge_plus", keep=13, signals=signals)
    assert bounded.rows.tolist() == exact.rows.tolist()


def test_many_outliers_take_every_patch():
    score = peaks(15, n=60)
    assert build("prumerge_plus", adaptive=True).counts(
        signals_of(score), vtprune.Budget.of(1.0)
    ) == [60]


@pytest.mark.parametrize("name", NAMES)
def test_the_block_after_the_features_is_read(name):
    clip = Facts(24, 22, True, Facts.signals_of(cls_row=True))
    siglip = Facts(27, 26, False, Facts.signals_of(cls_row=False), in_tower=False)
    (stage,) = build(name).plan(clip)
    assert stage.site is Site.ENCODER
    assert stage.needs == (WideClsRow(23), WideKeys(23))
    (stage,) = build(name).plan(siglip)
    assert stage.site is Site.PROJECTOR
    assert stage.needs == (Received(26), WideKeys(26))
    assert build(name, layers=(5,)).plan(clip)[0].needs == (WideClsRow(5), WideKeys(5))


@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.parametrize("name", NAMES)
def test_images_keep_counts_of_their_own(name, tower):
    model, inputs = tiny.build(tower), tiny.ragged()
    with vtprune.wrap(model, name, keep=30, adaptive=True) as handle:
        model.generate(**inputs, max_new_tokens=2)
        kept = [image.kept for image in handle.report().images]
    assert find_adapter(model).facts.feature_block == 2
    assert all(2 <= k <= 30 for k in kept)
    assert len(set(kept)) > 1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("neighbours", [-1, True])
def test_a_wrong_number_of_neighbours(name, neighbours):
    with pytest.raises(ConfigError, match=f"neighbours={neighbours} must be a count"):
        build(name, neighbours=neighbours)


def test_compat_is_about_counts():
    with pytest.raises(ConfigError, match="set adaptive=True"):
        build("prumerge", compat=True)
