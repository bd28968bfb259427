"""Zero-TPrune: where it acts, its counts, its two steps by hand, and maps of a real ViT."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import vtprune
from tests.vits.models import answer, assert_one_graph, build, images, wrap
from vtprune.errors import ConfigError, UnsupportedError
from vtprune.registry import build as strategy
from vtprune.strategies.zero_tprune import ZeroTPrune
from vtprune.types import (
    Budget,
    ClsRow,
    Facts,
    Inside,
    Maps,
    Selection,
    Signals,
    WideKeys,
    check_needs,
)

TOWER = Facts(12, 11, True, Facts.signals_of(cls_row=True))
ALONE = replace(TOWER, signals=TOWER.signals | {Maps})
LAYERS = (0, 2, 5, 8, 10)


def test_it_acts_after_five_blocks_of_a_vit_by_itself() -> None:
    stages = strategy("zero_tprune").plan(ALONE)
    assert tuple(stage.layer for stage in stages) == LAYERS
    assert not any(s.before_mlp or s.ahead or s.proportional for s in stages)
    assert stages[1].needs == (Maps(2), WideKeys(2), ClsRow(2))
    for other in (
        strategy("zero_tprune", uniform=True).plan(ALONE),
        strategy("zero_tprune").plan(replace(ALONE, has_cls=False)),
    ):
        assert other[1].needs == (Maps(2), WideKeys(2))
    deep = strategy("zero_tprune").plan(replace(ALONE, vision_layers=24, feature_block=23))
    assert [stage.layer for stage in deep] == [0, 4, 10, 16, 20]
    with pytest.raises(UnsupportedError, match="zero_tprune needs Maps"):
        check_needs(strategy("zero_tprune").plan(TOWER)[0].needs, TOWER, "zero_tprune")


def counts(
    keep: float | int, n: int, layers: tuple[int, ...] = LAYERS, **options: Any
) -> list[int]:
    made, found = strategy("zero_tprune", **options), []
    left = n
    for stage in range(len(layers)):
        signals = Signals(torch.zeros(1, left, 1), inside=Inside(stage, layers, 12, (n,)))
        (left,) = made.counts(signals, Budget.of(keep))
        found.append(left)
    return found


def test_counts_have_the_shape_of_the_published_shares() -> None:
    assert counts(65, 196) == [186, 158, 118, 75, 65]
    assert counts(0.5, 196)[-1] == 98
    assert counts(0.5, 100) == sorted(counts(0.5, 100), reverse=True)
    assert counts(1, 64)[-1] == 1
    assert counts(20, 64, (1, 4)) == [51, 20]
    assert counts(20, 64, tuple(range(8)))[-1] == 20


def test_as_many_resemble_others_as_published() -> None:
    made = ZeroTPrune()
    way = [196, 186, 158, 118, 75, 65]
    for stage in range(5):
        signals = Signals(torch.zeros(1, way[stage], 1), inside=Inside(stage, LAYERS, 12, (196,)))
        assert made.alike(signals, way[stage + 1]) == 10
    assert made.alike(Signals(torch.zeros(1, 196, 1)), 65) == 50


def test_two_steps_by_hand() -> None:
    # All look at 0 most, then 1 ...; 4 resembles 0, so it leaves first, then 3 and 2 by rank.
    row = torch.tensor([0.4, 0.25, 0.15, 0.12, 0.08])
    maps = row.expand(1, 1, 5, 5)
    keys = torch.tensor([[[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, -1], [1, 0.1, 0]]])
    signals = Signals(torch.zeros(1, 5, 1), values={Maps(0): maps, WideKeys(0): keys})
    options = {"retention": (0.5,), "similar": 66, "rounds": (2,)}
    assert ZeroTPrune(**options).alike(signals, 2) == 2
    options["similar"] = 40
    assert ZeroTPrune(**options).alike(signals, 2) == 1
    for k, kept in ((4, [0, 1, 2, 3]), (3, [0, 1, 2]), (2, [0, 1])):
        assert vtprune.select(ZeroTPrune(**options), keep=k, signals=signals).rows.tolist() == [
            kept
        ]


@pytest.mark.parametrize(
    "options",
    [
        {"retention": ()},
        {"retention": (0.5, 1.5)},
        {"rounds": (1, 1)},
        {"rounds": (0, 1, 1, 1, 1)},
        {"similar": -1},
        {"similar": 40},
        {"similar": True},
        {"variance": (0.5, 0.1)},
        {"similar": 0, "retention": (1.0,) * 5},
    ],
)
def test_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        strategy("zero_tprune", **options)


def test_it_sees_the_maps_of_the_block_that_it_acts_after() -> None:
    seen: list[Tensor] = []

    class Looks(ZeroTPrune):
        def select(self, signals: Signals, k: int) -> Selection:
            seen.append(signals.stack(Maps)[-1])
            return super().select(signals, k)

    model, x = build("vit"), images()
    shown: list[Tensor] = []
    model.blocks[1].attn.fused_attn = False
    with wrap(model, Looks(layers=(1,)), keep=20) as handle:
        answer(model, x)
        assert handle.report().tiles[0].attended == (65, 65, 21)
    hook = model.blocks[1].attn.attn_drop.register_forward_pre_hook(
        lambda module, args: shown.append(args[0])
    )
    answer(model, x)
    hook.remove()
    torch.testing.assert_close(seen[0], shown[0], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_it_compiles_to_one_graph() -> None:
    model, x = build("vit"), images()
    with wrap(model, "zero_tprune", keep=0.5):
        assert_one_graph(model, x)
