"""EViT: where it acts, what it fuses and counts, and faults that recorded cases must notice."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import vtprune
from tests.strategies.recorded import turns_red
from vtprune.registry import build
from vtprune.strategies import evit
from vtprune.types import Budget, ClsRow, Facts, Inside, Received, Signals

DEIT = Facts(12, 11, True, Facts.signals_of(cls_row=True))


@pytest.mark.parametrize(
    ("facts", "layers"),
    [
        (DEIT, [3, 6, 9]),
        (replace(DEIT, vision_layers=24, feature_block=22), [6, 12, 18]),
        (replace(DEIT, vision_layers=12, feature_block=7), [3, 6, 7]),
        (replace(DEIT, vision_layers=3, feature_block=2), [1, 2]),
        (replace(DEIT, in_tower=False), [None]),
    ],
)
def test_where_it_acts(facts: Facts, layers: list[int | None]) -> None:
    stages = build("evit").plan(facts)
    assert [stage.layer for stage in stages] == layers
    assert not any(stage.proportional for stage in stages)
    read = [need.layer for stage in stages for need in stage.tower_needs]
    assert read == [facts.feature_block if layer is None else layer for layer in layers]


def test_a_tower_without_cls_takes_attention_received() -> None:
    stages = build("evit").plan(replace(DEIT, has_cls=False))
    assert [stage.needs for stage in stages] == [(Received(layer),) for layer in (3, 6, 9)]


def test_every_stage_keeps_one_share_with_the_fused_token_counted() -> None:
    left = []
    for stage, n in enumerate((196, 139, 99)):
        signals = Signals(torch.zeros(2, n, 1), inside=Inside(stage, (3, 6, 9), 12, (196, 100)))
        left.append(build("evit").counts(signals, Budget.of(71))[0])
    assert left == [139, 99, 71]  # ceil(0.7 n) + 1, as of the authors
    signals = Signals(torch.zeros(1, 196, 1), inside=Inside(0, (3, 6, 9), 12, (196,)))
    assert build("evit", fuse=False).counts(signals, Budget.of(69)) == [138]
    assert build("evit").counts(replace(signals, inside=None), Budget.of(0.5)) == [98]


def test_a_fused_token_by_hand() -> None:
    score = torch.tensor([[0.1, 0.3, 0.05, 0.2], [float("nan"), 0.3, 0.1, 0.2]])
    x = torch.tensor([[1.0], [2.0], [4.0], [8.0]]).expand(2, 4, 1)
    signals = Signals(x, values={ClsRow(0): score}, size=torch.tensor([[2.0, 1, 5, 3]] * 2))
    made = vtprune.select("evit", keep=3, signals=signals)
    assert made.rows.tolist() == [[1, 3, -1]] * 2
    torch.testing.assert_close(
        made.apply(x)[..., 0], torch.tensor([[2.0, 8.0, 0.1 + 0.2], [2.0, 8.0, 0.4]])
    )
    assert made.counted(signals.size).tolist() == [[1.0, 3.0, 1.0]] * 2  # type: ignore[arg-type]
    alone = vtprune.select("evit", keep=1, signals=signals)
    assert alone.rows.tolist() == [[-1]] * 2
    plain = vtprune.select(build("evit", fuse=False), keep=3, signals=signals)
    assert plain.rows.tolist() == [[0, 1, 3], [1, 2, 3]]
    assert plain.mix is None


def evened(kept: Tensor, n: int) -> Tensor:
    return evit_outside(kept, n).flip(1)[:, 1:]


evit_outside = evit.outside


def lowest(score: Tensor, k: int) -> Tensor:
    return right(-score, k)


right = evit.topk_sorted


@pytest.mark.parametrize(
    ("name", "fault", "cases"),
    [
        ("outside", evened, {"c3_rate09_fuse_second_stage"}),
        ("topk_sorted", lowest, {"c2_rate05_nofuse", "c3_rate09_fuse_second_stage"}),
    ],
)
def test_faults_turn_the_recorded_cases_red(
    name: str, fault: Any, cases: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    turns_red("evit", evit, name, fault, cases, monkeypatch)
