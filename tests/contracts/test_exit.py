"""What is promised of strategies that let all tokens of a sample leave, or none."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.contracts.bank import TOWERS, WIDTH, cast, make_signals
from tests.gates import random_gates
from vtprune.registry import build, strategy_class, strategy_names
from vtprune.types import Budget, Strategy, TextState

NAMES = [name for name in strategy_names() if strategy_class(name).kind == "exit"]
FACTS = TOWERS["with CLS"]
N, BATCH = 9, 16
each = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(scope="module", params=["per_layer", "shared"])
def path(request, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("gates")
    return str(random_gates(folder, FACTS.decoder_layers, 2 * WIDTH, request.param))


def made(name: str, path: str, **options: object) -> Strategy:
    strategy = build(name, gates=path, **options)
    assert (strategy.positions, strategy.scope, strategy.acts_inside) == ("keep", "sample", True)
    return strategy


@each
@pytest.mark.parametrize(("threshold", "left"), [(float("inf"), [N]), (0.0, [0, N]), (-1e9, [0])])
def test_none_some_or_all_leave(name, path, threshold, left):
    strategy = made(name, path, threshold=threshold)
    counts = strategy.counts(make_signals(strategy, FACTS, BATCH, N), Budget.of(1.0))
    assert sorted(set(counts)) == left


@each
def test_a_sample_is_decided_alone(name, path):
    strategy = made(name, path)
    signals = make_signals(strategy, FACTS, BATCH, N)
    together = strategy.counts(signals, Budget.of(0.4))
    alone = [strategy.counts(signals.rows(torch.tensor([b])), Budget.of(0.4)) for b in range(BATCH)]
    assert [[count] for count in together] == alone
    assert strategy.counts(signals, Budget.of(0.4)) == together


@each
def test_more_leave_the_less_is_to_stay(name, path):
    strategy = made(name, path)
    signals = make_signals(strategy, FACTS, 64, N)
    left = [sum(strategy.counts(signals, Budget.of(k))) for k in (0.1, 0.3, 0.6, 0.9, 1.0)]
    assert left == sorted(left) and left[0] < left[-1] == 64 * N
    tokens = [sum(strategy.counts(signals, Budget.of(k))) for k in (1, 3, 6, 9)]
    assert tokens == sorted(tokens) and tokens[-1] == 64 * N


@each
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_no_numbers(name, path, dtype):
    strategy = made(name, path, threshold=-1e9)
    signals = cast(make_signals(strategy, FACTS, 2, N), dtype)
    assert strategy.counts(signals, Budget.of(1.0)) == [0, 0]
    nan = {need: torch.full_like(value, float("nan")) for need, value in signals.values.items()}
    broken = dataclasses.replace(signals, values=nan)
    assert strategy.counts(broken, Budget.of(1.0)) == [N, N]


@each
def test_it_reads_what_enters_each_layer_but_the_first(name, path):
    stages = made(name, path).plan(FACTS)
    layers = list(range(1, FACTS.decoder_layers))
    assert [stage.layer for stage in stages] == layers
    assert [stage.needs for stage in stages] == [(TextState(layer),) for layer in layers]
