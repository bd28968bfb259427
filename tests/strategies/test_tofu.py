"""ToFu: which blocks drop and which merge, and faults that the recorded cases must notice."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import vtprune
from tests.strategies.recorded import turns_red
from vtprune.registry import build
from vtprune.strategies import tofu
from vtprune.strategies.tofu import ToFu
from vtprune.types import Facts, Inside, Keys, Signals


def signals(layer: int | None, depth: int = 12, n: int = 6) -> Signals:
    keys = torch.randn(1, n, 4, generator=torch.Generator().manual_seed(0))
    inside = None if layer is None else Inside(0, (layer,), depth, (n,))
    return Signals(keys * 3, values={Keys(layer or 0): keys}, inside=inside, n_prefix=1)


@pytest.mark.parametrize(
    ("strategy", "depth", "dropping"),
    [
        (ToFu(), 12, 6),
        (ToFu(compat=True), 12, 7),
        (ToFu(), 13, 7),
        (ToFu(compat=True), 13, 7),
        (ToFu(prune=0.0), 12, 0),
        (ToFu(prune=1.0), 12, 12),
    ],
)
def test_early_blocks_drop(strategy: ToFu, depth: int, dropping: int) -> None:
    found = [strategy.select(signals(layer, depth), 4).mix is None for layer in range(depth)]
    assert found == [True] * dropping + [False] * (depth - dropping)


def test_without_blocks_it_merges_unless_told() -> None:
    assert ToFu().select(signals(None), 4).mix is not None
    assert ToFu(prune=1.0).select(signals(None), 4).mix is None


def test_it_matches_as_tome_does_and_weighs_nothing() -> None:
    for layer in (2, 9):
        theirs = build("tome").select(signals(layer), 4)
        assert torch.equal(build("tofu").select(signals(layer), 4).rows, theirs.rows)
    facts = Facts(12, 11, True, Facts.signals_of(cls_row=True))
    stages = build("tofu").plan(facts)
    assert [s.layer for s in stages] == list(range(12))
    assert all(s.before_mlp and not s.proportional for s in stages)
    given = signals(9)
    sized = replace(given, size=torch.tensor([[5.0, 1, 9, 1, 3, 1]]))
    made = [ToFu().select(some, 3).apply(given.tokens) for some in (given, sized)]
    assert torch.equal(*made)


def test_a_share_out_of_range_is_refused() -> None:
    with pytest.raises(vtprune.ConfigError, match=r"prune=1\.5"):
        ToFu(prune=1.5)


RIGHT = tofu.norm_preserving


@pytest.mark.parametrize(
    ("where", "name", "fault", "cases"),
    [
        (
            tofu,
            "norm_preserving",
            lambda rows, into, x, by: RIGHT(rows, into, torch.ones_like(x), by),
            {"c3_merge_paper_r085"},
        ),
        (
            tofu,
            "norm_preserving",
            lambda rows, into, x, by: RIGHT(rows, into, x, not by),
            {"c3_merge_paper_r085"},
        ),
        (ToFu, "drops", lambda self, signals: True, {"c3_merge_paper_r085"}),
        (ToFu, "drops", lambda self, signals: False, {"c1_prune_r090"}),
    ],
)
def test_faults_turn_the_recorded_cases_red(
    where: Any, name: str, fault: Any, cases: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    turns_red("tofu", where, name, fault, cases, monkeypatch)
