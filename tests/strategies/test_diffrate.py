"""DiffRate: its counts block by block, own lists, and faults that recorded cases must notice."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

import vtprune
from tests.strategies.recorded import turns_red
from vtprune.registry import build
from vtprune.scoring import tails
from vtprune.scoring.rates import PUBLISHED, Rates
from vtprune.strategies.diffrate import DiffRate
from vtprune.types import Budget, ClsRow, Facts, Inside, Received, Selection, Signals

DEIT = Facts(12, 11, True, Facts.signals_of(cls_row=True))


def inside(stage: int, n: int = 196, depth: int = 12) -> Inside:
    return Inside(stage, tuple(range(depth)), depth, (n,))


@pytest.mark.parametrize("name", PUBLISHED)
def test_blocks_prune_and_merge_as_published(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[int, int]] = []
    right = tails.merge_tail

    def seen(order: Any, k: int, pruned: int, tokens: Any, size: Any) -> Selection:
        given.append((tokens.shape[1] - pruned + 1, k + 1))
        return right(order, k, pruned, tokens, size)

    monkeypatch.setattr("vtprune.strategies.diffrate.merge_tail", seen)
    strategy, n, before = build("diffrate", rates=name), 196, 197
    rates = PUBLISHED[name]
    for stage, wanted in enumerate(zip(rates.prune, rates.merge, strict=True)):
        score = torch.rand(1, n, generator=torch.Generator().manual_seed(stage))
        signals = Signals(torch.randn(1, n, 3), values={ClsRow(stage): score}, inside=inside(stage))
        (k,) = strategy.counts(signals, Budget.of(2))
        if k < n:
            strategy.select(signals, k)
            assert given[-1] == wanted
        n, before = k, wanted[1]
        assert n + 1 == before


def test_it_acts_in_every_block_by_what_cls_attends_to() -> None:
    stages = build("diffrate").plan(DEIT)
    assert [s.needs for s in stages] == [(ClsRow(layer),) for layer in range(12)]
    assert all(s.before_mlp and s.proportional for s in stages)
    plain = replace(DEIT, has_cls=False)
    stages = build("diffrate", prop_attn=False).plan(plain)
    assert [s.needs for s in stages] == [(Received(layer),) for layer in range(12)]
    assert not any(s.proportional for s in stages)


def test_some_layers_and_other_depths_end_at_what_is_asked() -> None:
    for layers, depth in (((3, 6, 9), 12), (tuple(range(23)), 24), ((5,), 12)):
        n, counts = 576, [576]
        for stage in range(len(layers)):
            here = Inside(stage, layers, depth, (576,))
            signals = Signals(torch.zeros(1, n, 1), inside=here)
            (n,) = build("diffrate").counts(signals, Budget.of(0.25))
            counts.append(n)
        assert n == 144
        assert all(a >= b for a, b in pairwise(counts))


def test_own_lists_are_taken_as_they_are() -> None:
    own = DiffRate(rates=([8, 5], [6, 4]), tokens=10)  # type: ignore[arg-type]
    assert own == DiffRate(rates=((8, 5), (6, 4)), tokens=10)
    assert hash(own) == hash(DiffRate(rates=((8, 5), (6, 4)), tokens=10))
    assert own.schedule == Rates((8, 5), (6, 4), 10)
    signals = Signals(torch.zeros(1, 9, 1), inside=inside(0, 9, 2))
    assert own.counts(signals, Budget.of(3)) == [5]


@pytest.mark.parametrize(
    "options",
    [
        {"rates": "deit_s"},
        {"rates": "deit_s_2.3", "tokens": 145},
        {"rates": 5},
        {"rates": (5, 4)},
        {"rates": ((5,), (4,), (3,))},
        {"rates": ((5,), (6,)), "tokens": 9},
    ],
)
def test_bad_lists_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(vtprune.ConfigError, match="rates="):
        build("diffrate", **options)


def merge_only(self: Rates, first: float, last: float) -> float:
    return 0.0


def by_sum(self: Selection, sizes: torch.Tensor) -> torch.Tensor:
    return self.total(sizes)


@pytest.mark.parametrize(
    ("where", "name", "fault", "cases"),
    [
        (Rates, "pruned", merge_only, {"c2_prune_only"}),
        (Rates, "pruned", lambda *at: 1.0, {"c3_merge_only_sizes"}),
        (Selection, "counted", by_sum, {"c3_merge_only_sizes"}),
        (tails, "unit", lambda x: (x, x[..., 0] == torch.inf), {"c3_merge_only_sizes"}),
    ],
)
def test_faults_turn_the_recorded_cases_red(
    where: Any, name: str, fault: Any, cases: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    turns_red("diffrate", where, name, fault, cases, monkeypatch)
