"""ToMe: where it acts, what it merges, and faults that the recorded cases must notice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import vtprune
from tests.golden_harness import GoldenError, check, find_adapter, find_cases
from vtprune.engine import blocks
from vtprune.registry import build
from vtprune.scoring import matching
from vtprune.strategies import _blocks
from vtprune.types import Budget, Facts, Inside, Keys, Selection, Signals, Site

CLIP = Facts(24, 22, True, Facts.signals_of(cls_row=True))
GOLDEN = Path(__file__).parents[1] / "golden" / "tome"


def test_it_acts_in_every_block_up_to_the_features() -> None:
    stages = build("tome").plan(CLIP)
    assert [stage.layer for stage in stages] == list(range(23))
    assert [stage.needs for stage in stages] == [(Keys(layer),) for layer in range(23)]
    assert all(s.site is Site.ENCODER and s.before_mlp and s.proportional for s in stages)
    stages = build("tome", layers=(4, 2), prop_attn=False).plan(CLIP)
    assert [stage.layer for stage in stages] == [2, 4]
    assert not any(stage.proportional for stage in stages)


def test_it_merges_projected_tokens_where_a_token_is_made_of_several_patches() -> None:
    facts = replace(CLIP, in_tower=False, feature_block=23, full_blocks=(7, 15))
    (stage,) = build("tome").plan(facts)
    assert stage.site is Site.PROJECTOR
    assert stage.needs == (Keys(15),)


def test_counts_are_those_of_the_schedule_and_by_tile() -> None:
    signals = Signals(torch.zeros(2, 30, 1), inside=Inside(1, (0, 1, 2), 4, (36, 40)))
    assert build("tome").counts(signals, Budget.of(15)) == [22, 23]
    assert build("tome").counts(signals, Budget.of(0.25)) == [18, 20]
    assert build("tome").counts(replace(signals, inside=None), Budget.of(0.5)) == [15, 15]


def test_a_merge_by_hand() -> None:
    # Behind [CLS] 1 and 3 are at even places; 3 is as 4, 1 is nearer to 2 than to 0.
    keys = torch.tensor([[[1.0, 0.0], [1.0, 1.0], [1.0, 2.0], [0.0, 3.0], [0.0, 1.0]]])
    signals = Signals(
        torch.tensor([[[1.0], [2.0], [3.0], [4.0], [8.0]]]),
        values={Keys(0): keys},
        n_prefix=1,
        size=torch.tensor([[1.0, 1.0, 1.0, 3.0, 1.0]]),
    )
    selection = vtprune.select("tome", keep=4, signals=signals)
    assert selection.rows.tolist() == [[0, 1, 2, 4]]
    assert selection.apply(signals.tokens).tolist() == [[[1.0], [2.0], [3.0], [5.0]]]
    both = vtprune.select("tome", keep=3, signals=signals)
    assert both.apply(signals.tokens).tolist() == [[[1.0], [2.5], [5.0]]]
    plain = vtprune.select("tome", keep=4, signals=replace(signals, size=None))
    assert plain.apply(signals.tokens).tolist() == [[[1.0], [2.0], [3.0], [6.0]]]


def test_between_blocks_outputs_wait_in_the_official_order() -> None:
    signals = Signals(
        torch.zeros(1, 6, 1),
        values={Keys(0): torch.ones(1, 6, 2)},
        inside=Inside(0, (0,), 4, (6,)),
        n_prefix=1,
    )
    rows = build("tome").select(signals, 4).rows.tolist()
    assert rows == [[5, 0, 2, 4]]


def unweighted(rows: Tensor, into: Tensor, size: Tensor) -> Selection:
    return matching.averaged(rows, into, torch.ones_like(size))


def in_raster_order(rows: Tensor, into: Tensor, size: Tensor) -> Selection:
    return matching.averaged(*matching.ascending(rows, into), size)


def other_halves(n: int, n_prefix: int, device: Any = None) -> tuple[Tensor, Tensor]:
    order = torch.arange(n)
    return order[1 - n_prefix % 2 :: 2], order[n_prefix % 2 :: 2]


@pytest.mark.parametrize(
    ("where", "name", "fault", "cases"),
    [
        (_blocks, "averaged", unweighted, {"c2_cls_sizes_r40", "c3_vit4_r8"}),
        (_blocks, "averaged", in_raster_order, {"c3_vit4_r8"}),
        (matching, "halves", other_halves, {"c1_cls_r16", "c2_cls_sizes_r40", "c3_vit4_r8"}),
        (blocks, "_log_sizes", lambda tiles, n_prefix: None, {"c3_vit4_r8"}),
    ],
)
def test_faults_turn_the_recorded_cases_red(
    where: Any, name: str, fault: Any, cases: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = find_adapter("tome")
    assert not isinstance(adapter, str)
    found = find_cases(GOLDEN)
    for case in found:
        check(case, adapter)
    monkeypatch.setattr(where, name, fault)
    for case in found:
        if case.path.stem in cases:
            with pytest.raises(GoldenError, match="differs"):
                check(case, adapter)
