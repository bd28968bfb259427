"""VScan: both halves of the encoder's budget, the authors' counts, and the mean over layers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import vtprune
from tests import tiny
from tests.contracts.bank import TOWERS, assert_valid, broken, make_signals
from tests.kernels.kernel_inputs import normal
from vtprune.errors import ConfigError
from vtprune.registry import build
from vtprune.strategies.vscan import VScan
from vtprune.types import (
    Budget,
    ClsRow,
    Facts,
    Inside,
    LastRow,
    Quantity,
    Received,
    Signals,
    Site,
)

LLAVA = Facts(24, 22, True, Facts.signals_of(cls_row=True), n_tokens=576, decoder_layers=32)
QWEN = Facts(
    32,
    31,
    False,
    Facts.signals_of(cls_row=False),
    decoder_layers=28,
    full_blocks=(7, 15, 23, 31),
    in_tower=False,
)


def clip(side: int, batch: int = 1) -> Signals:
    values: dict[Quantity, Tensor] = {
        ClsRow(5): normal(batch, side**2, seed=1),
        ClsRow(22): normal(batch, side**2, seed=2),
    }
    return Signals(normal(batch, side**2, 8), (1, side, side), values=values)


def test_it_reads_a_shallow_and_a_deep_block_and_acts_at_two_sites():
    before, inside = build("vscan").plan(LLAVA)
    assert (before.site, before.needs) == (Site.PROJECTOR, (ClsRow(5), ClsRow(22)))
    assert (inside.site, inside.layer, inside.needs) == (Site.DECODER, 16, (LastRow(16),))
    before, inside = build("vscan").plan(QWEN)
    assert before.needs == (Received(7), Received(31))
    assert inside.layer == 14
    (before,) = build("vscan", inside=False).plan(LLAVA)
    assert (before.site, before.times) == (Site.PROJECTOR, 1)
    with pytest.raises(ConfigError, match=r"inside=True: .* give inside=False"):
        build("vscan").plan(replace(LLAVA, decoder_layers=1))


@pytest.mark.parametrize("facts", [LLAVA, QWEN])
def test_three_halves_enter_and_half_of_it_is_left(facts):
    strategy = build("vscan")
    before, inside = strategy.plan(facts)
    budget = Budget.of(64).times(before.times)
    assert budget.count(576) == 96
    where = Inside(0, (inside.layer or 0,), facts.decoder_layers, (96,), images=((576,),))
    signals = Signals(torch.zeros(1, 96, 1), values={LastRow(16): normal(1, 96)}, inside=where)
    assert strategy.counts(signals, Budget.of(64)) == [32]
    assert strategy.counts(signals, Budget.of(1 / 9)) == [32]


def test_whatever_entered_the_mean_is_kept():
    strategy = build("vscan")
    where = Inside(0, (16,), 32, (576, 300), images=((576,), (100, 200)))
    signals = Signals(torch.zeros(2, 200, 1), values={LastRow(16): normal(2, 200)}, inside=where)
    # 16 layers of 200 and then 88 are 144 on average; 50 + 100 of two images, so 100 are left.
    assert strategy.counts(signals, Budget.of(0.25)) == [88, 1]
    assert strategy.counts(signals, Budget.of(0.5)) == [200, 100]
    assert strategy.counts(signals, Budget.of(1.0)) == [200, 200]


def test_windows_share_half_of_the_budget_and_the_deep_block_has_the_rest():
    signals = clip(12)
    selection = vtprune.select("vscan", keep=24, signals=signals, inside=False)
    shallow, deep = (value[0].view(12, 12) for value in signals.values.values())
    wanted = set()
    for y in (0, 6):
        for x in (0, 6):
            for i in shallow[y : y + 6, x : x + 6].flatten().topk(3).indices.tolist():
                wanted.add((y + i // 6) * 12 + x + i % 6)
    rest = [i for i in deep.flatten().argsort(descending=True).tolist() if i not in wanted]
    assert selection.rows[0].tolist() == sorted(wanted | set(rest[:12]))
    assert selection.total(torch.ones(1, 144)).sum() == 144


@pytest.mark.parametrize("k", [1, 2, 9, 30, 70, 143])
def test_the_budget_is_exact_where_windows_cannot_share_it(k):
    signals, strategy = clip(12, 3), build("vscan")
    assert strategy.counts(signals, Budget.of(k)) == [k] * 3
    assert_valid(strategy.select(signals, k), 3, 144, k, TOWERS["with CLS"])
    official = build("vscan", compat=True).counts(signals, Budget.of(k))
    assert official == [k - k // 2 + k // 2 // 4 * 4] * 3
    (count, *_) = official
    assert_valid(strategy.select(signals, count), 3, 144, count, TOWERS["with CLS"])


def test_compat_picks_as_many_locally_as_the_authors():
    signals, strategy = clip(12), VScan()
    (count,) = build("vscan", compat=True).counts(signals, Budget.of(31))
    assert count == 12 + 16  # 15 in 4 windows are 3 each
    local = strategy.local(signals, count)
    assert int(local.sum()) == 12
    assert int(strategy.local(signals, 31).sum()) == 12
    assert build("vscan", compat=True).counts(signals, Budget.of(144)) == [144]


def test_without_cls_windows_fill_up_their_half():
    values: dict[Quantity, Tensor] = {
        Received(7): normal(1, 96, seed=1),
        Received(31): normal(1, 96, seed=2),
    }
    signals = Signals(normal(1, 96, 8), (1, 8, 12), values=values)
    strategy = VScan()
    for k in (5, 31, 50):
        assert int(strategy.local(signals, k).sum()) == k // 2
        assert_valid(strategy.select(signals, k), 1, 96, k, TOWERS["without CLS"])


def test_nan_breaks_no_other_image():
    signals = make_signals(build("vscan"), TOWERS["with CLS"], 3, 36)
    clean = build("vscan").select(signals, 9)
    for tokens in ([0], [4, 17, 35], list(range(36))):
        selection = build("vscan").select(broken(signals, [1], tokens), 9)
        assert_valid(selection, 3, 36, 9, TOWERS["with CLS"])
        for row in (0, 2):
            assert torch.equal(selection.rows[row], clean.rows[row])


@pytest.mark.parametrize("keep", [8, 15, 0.5, 0.9])
def test_the_mean_over_layers_is_kept_in_a_model(keep):
    model = tiny.build()
    with vtprune.wrap(model, "vscan", keep=keep) as handle:
        model(**tiny.one_image())
        report = handle.report()
    (image,), (stage,) = report.images, report.stages
    wanted = Budget.of(keep).count(tiny.N)
    assert not image.short
    assert image.kept == min(tiny.N, round(1.5 * Budget.of(keep).count(tiny.N)))
    assert (stage.layer, stage.tokens) == (2, image.kept)
    assert abs((2 * stage.tokens + 2 * stage.kept) / 4 - wanted) <= 0.5
