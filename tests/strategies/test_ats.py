"""ATS: where it acts, how many stay, and that images of one batch are left different counts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import vtprune
from tests.golden_harness import GoldenError, check, find_adapter, find_cases
from tests.test_golden import SHIPPED
from tests.vits.models import PATCHES, answer, build, images, wrap
from vtprune.errors import ConfigError
from vtprune.registry import build as strategy
from vtprune.strategies.ats import ATS
from vtprune.types import (
    Budget,
    ClsRow,
    Facts,
    Inside,
    Received,
    Selection,
    Signals,
    Site,
    ValueNorm,
)

VIT = Facts(12, 11, True, Facts.signals_of(cls_row=True))


def drawn(n: int, inside: Inside | None = None, seed: int = 0) -> Signals:
    generator = torch.Generator().manual_seed(seed)
    values = {
        ClsRow(3): torch.randn(2, n, generator=generator).mul(2).softmax(-1),
        ValueNorm(3): torch.rand(2, n, generator=generator) + 0.5,
    }
    return Signals(torch.randn(2, n, 4, generator=generator), values=values, inside=inside)


def test_it_samples_in_the_last_three_quarters_before_the_mlp() -> None:
    stages = strategy("ats").plan(VIT)
    assert [stage.layer for stage in stages] == list(range(3, 12))
    assert all(s.before_mlp and s.site is Site.ENCODER for s in stages)
    assert stages[0].needs == (ClsRow(3), ValueNorm(3))
    bare = replace(VIT, has_cls=False, signals=Facts.signals_of(cls_row=False))
    assert strategy("ats").plan(bare)[0].needs == (Received(3), ValueNorm(3))


def test_keep_is_the_most_that_stay_and_images_differ() -> None:
    inside = Inside(0, (3, 4), 12, (100, 100))
    signals = drawn(100, inside)
    made = ATS()
    most: list[int] = []
    for keep in (2, 10, 30, 60, 99):
        counts = made.counts(signals, Budget.of(keep))
        assert all(min(8, keep) <= count <= keep for count in counts)
        most.append(max(counts))
        for row, count in enumerate(counts):
            alone = signals.rows(torch.tensor([row]))
            chosen = made.select(alone, count).rows[0]
            sampled = made.sample(alone, keep)[0].nonzero()[:, 0]
            assert set(sampled.tolist()) <= set(chosen.tolist())
            assert len(sampled) == count or count == min(8, keep)
    assert most == sorted(most)
    assert len(set(made.counts(signals, Budget.of(60)))) == 2
    assert made.counts(signals, Budget.of(1.0)) == [100, 100]


def test_a_grid_samples_even_where_all_may_stay() -> None:
    signals = drawn(100)
    counts = ATS(grid=101).counts(signals, Budget.of(1.0))
    assert all(20 < count < 100 for count in counts)
    smaller = ATS(grid=31).counts(signals, Budget.of(1.0))
    assert all(a < b and a <= 30 for a, b in zip(smaller, counts, strict=True))
    cropped = ATS(grid=31, compat=True).sample(signals, 100)
    score = ATS().significance(signals)
    for row in range(2):
        best = score[row].topk(30).indices
        assert set(cropped[row].nonzero()[:, 0].tolist()) <= set(best.tolist())


def test_where_it_acts_once_the_count_is_exact() -> None:
    chosen = vtprune.select("ats", keep=20, signals=drawn(100))
    assert chosen.rows.shape == (2, 20)
    assert (chosen.rows.diff() > 0).all()


@pytest.mark.parametrize("grid", [2, 0, True])
def test_options_out_of_range(grid: int) -> None:
    with pytest.raises(ConfigError, match="grid="):
        strategy("ats", grid=grid)


@pytest.mark.parametrize("name", ["vit", "dinov3", "open_clip"])
def test_an_image_is_the_same_alone_and_in_a_batch(name: str) -> None:
    model, x = build(name), images(4)
    with wrap(model, "ats", keep=1.0, grid=PATCHES + 1) as handle:
        together = answer(model, x)
        kept = [image.kept for image in handle.report().images]
        assert len(set(kept)) > 1
        for row in range(4):
            alone = answer(model, x[row : row + 1])
            torch.testing.assert_close(alone[0], together[row], rtol=1e-4, atol=1e-4)
            assert handle.report().images[0].kept == kept[row]


def test_it_is_the_same_as_attending_with_the_sampled_queries_alone() -> None:
    """Block 1 by hand: rows of attention of the sample, on all keys, added to its own states."""
    model, x = build("vit"), images(1)
    outs: dict[int, Any] = {}
    with wrap(model, "ats", keep=24, layers=(1,)) as handle:
        hooks = [
            model.blocks[i].register_forward_hook(lambda m, a, out, i=i: outs.update({i: out}))
            for i in (0, 1)
        ]
        answer(model, x)
        rows = torch.cat([torch.zeros(1).long(), handle.selections[0].rows[0] + 1])
    for hook in hooks:
        hook.remove()
    block = model.blocks[1]
    with torch.no_grad():
        qkv = block.attn.qkv(block.norm1(outs[0])).unflatten(-1, (3, 3, 16)).permute(2, 0, 3, 1, 4)
        heard = (qkv[0][:, :, rows] @ qkv[1].mT / 4).softmax(-1) @ qkv[2]
        made = outs[0][:, rows] + block.attn.proj(heard.transpose(1, 2).flatten(2))
        made = made + block.mlp(block.norm2(made))
        significance = (qkv[0][:, :, :1] @ qkv[1].mT / 4).softmax(-1).sum(1)[:, 0, 1:]
        significance = significance * qkv[2].transpose(1, 2).flatten(2).norm(dim=-1)[:, 1:]
    torch.testing.assert_close(outs[1], made, rtol=1e-4, atol=1e-4)
    values = {ClsRow(0): significance, ValueNorm(0): torch.ones_like(significance)}
    inside = Inside(0, (1,), 3, (PATCHES,))
    signals = Signals(outs[0][:, 1:], values=values, inside=inside)
    (count,) = ATS().counts(signals, Budget.of(24))
    assert torch.equal(ATS().select(signals, count).rows[0] + 1, rows[1:])


def test_a_fault_turns_the_recorded_case_red(monkeypatch: pytest.MonkeyPatch) -> None:
    def best(self: ATS, signals: Signals, k: int) -> Selection:
        order = self.significance(signals).topk(k).indices
        return Selection(order.sort().values, signals.n)

    adapter, cases = find_adapter("ats"), find_cases(SHIPPED / "ats")
    assert not isinstance(adapter, str)
    monkeypatch.setattr(ATS, "select", best)
    with pytest.raises(GoldenError, match="differs"):
        check(cases[0], adapter)
