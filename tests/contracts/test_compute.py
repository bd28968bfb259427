"""What strategies promise from which no token leaves; what they compute is in engine/."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import vtprune
from tests.contracts.bank import BY_ROWS, TOWERS, make_signals
from tests.projectors import given
from vtprune.errors import ConfigError, UnsupportedError
from vtprune.projectors import Projector, Projectors
from vtprune.registry import build, strategy_class, strategy_names
from vtprune.types import Intervention, RowRule, Site, SparsePrefill

INSIDE = [name for name in strategy_names() if strategy_class(name).acts_inside]
NAMES = [name for name in INSIDE if strategy_class(name).kind == "compute"]
DEPTHS = (1, 2, 4, 12, 28, 32, 40, 64)
each = pytest.mark.parametrize("name", NAMES)


def facts_of(depth: int):
    return dataclasses.replace(TOWERS["with CLS"], decoder_layers=depth)


def test_the_bank_is_not_empty() -> None:
    assert {"eemllm", "naavit", "saisa", "shortv", "yopo", "zipvl"} <= set(NAMES)


@each
@pytest.mark.parametrize("depth", DEPTHS)
def test_a_plan_is_a_rule_for_each_of_some_layers(name: str, depth: int) -> None:
    facts = facts_of(depth)
    stages = build(name).plan(facts)
    layers = [stage.layer or 0 for stage in stages]
    assert stages == build(name).plan(facts)
    assert layers == sorted(set(layers))
    assert set(layers) <= set(range(depth))
    for stage in stages:
        assert stage.site is Site.DECODER
        assert isinstance(stage.rule, RowRule if name in BY_ROWS else (Intervention, SparsePrefill))
        assert stage.needs == stage.rule.needs


@pytest.mark.parametrize("name", sorted(BY_ROWS & set(NAMES)))
def test_something_is_saved_by_the_formula(name: str) -> None:
    shape = {"tokens": 576, "width": 4096, "ffn": 11008}
    with torch.device("meta"):
        projectors = Projectors([Projector(1024, 4096, 4096)] * 32)
    rules = [stage.rule for stage in given(name, projectors).plan(facts_of(32))]
    costs = [rule.macs(**shape, heads=32) for rule in rules if isinstance(rule, RowRule)]
    assert all(0 < cost <= RowRule().macs(**shape) for cost in costs)
    assert sum(costs) < len(costs) * RowRule().macs(**shape)


@each
def test_layers_are_used_as_given(name: str) -> None:
    facts = facts_of(12)
    stages = build(name, layers=(7, 0)).plan(facts)
    assert [stage.layer for stage in stages] == [0, 7]
    for wrong in ((12,), (-1,), (3, 3), ()):
        with pytest.raises(ConfigError, match="decoder layers 0 to 11 to act in"):
            build(name, layers=wrong).plan(facts)


@each
def test_where_no_layer_is_known_it_is_refused(name: str) -> None:
    with pytest.raises(UnsupportedError, match=f"{name} acts inside the language model"):
        build(name).plan(facts_of(0))


@each
def test_it_chooses_no_tokens(name: str) -> None:
    signals = make_signals(build("random"), TOWERS["with CLS"], 2, 9)
    with pytest.raises(ConfigError, match=f"{name} chooses no tokens; give it to wrap"):
        vtprune.select(name, keep=3, signals=signals)


@each
def test_tokens_keep_their_positions_and_samples_are_whole(name: str) -> None:
    strategy = build(name)
    assert (strategy.kind, strategy.positions, strategy.scope) == ("compute", "keep", "sample")
    assert strategy.acts_inside
