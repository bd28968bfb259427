"""Budgets, layers, signals and selections."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.contracts.bank import TOWERS
from vtprune.errors import ConfigError, InputError
from vtprune.types import (
    Budget,
    ClsRow,
    Facts,
    Keys,
    Mix,
    Received,
    Selection,
    Signals,
    Strategy,
)


@pytest.mark.parametrize(
    "keep", [0, -1, True, False, 1.5, -0.1, 0.0, math.nan, math.inf, -math.inf, "64", None, [8]]
)
def test_what_is_no_budget(keep: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        Budget.of(keep)
    assert f"keep={keep}" in str(caught.value).replace(repr(keep), str(keep))
    assert "a token count of at least 1, or a share above 0.0 and up to 1.0" in str(caught.value)


def test_what_is_a_budget() -> None:
    assert Budget.of(64) == Budget(tokens=64)
    assert Budget.of(0.25) == Budget(fraction=0.25)
    assert Budget.of(1) == Budget(tokens=1)
    assert Budget.of(1.0) == Budget(fraction=1.0)
    assert Budget.of(Budget(tokens=3)) == Budget(tokens=3)


@pytest.mark.parametrize("fields", [{}, {"tokens": 3, "fraction": 0.5}])
def test_a_budget_is_one_of_two(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="exactly one"):
        Budget(**fields)


@given(keep=st.integers(1, 5000) | st.floats(0, 1, exclude_min=True), n=st.integers(1, 3000))
def test_counts_are_possible_and_close_to_what_was_asked(keep: int | float, n: int) -> None:
    count = Budget.of(keep).count(n)
    assert 1 <= count <= n
    if isinstance(keep, int):
        assert count == min(keep, n)
    else:
        assert count == 1 or abs(count - keep * n) <= 0.5


def test_more_tokens_than_there_always_are() -> None:
    with pytest.raises(ConfigError, match="keep=700, but an image has 576 tokens"):
        Budget.of(700).check(576)
    Budget.of(576).check(576)
    Budget.of(1.0).check(1)


@dataclass(frozen=True)
class Reads(Strategy):
    """Reads two blocks."""

    def default_layers(self, facts: Facts) -> tuple[int, ...]:
        return (8, 10)


def test_layers_are_used_as_given() -> None:
    facts = TOWERS["with CLS"]
    assert Reads().used_layers(facts) == (8, 10)
    assert Reads(layers=(7, 0)).used_layers(facts) == (0, 7)


@pytest.mark.parametrize("layers", [(11,), (-1,), (), (3, 3), (True,)])
def test_layers_out_of_reach(layers: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="blocks 0 to 10"):
        Reads(layers=layers).used_layers(TOWERS["with CLS"])


def test_layers_of_a_strategy_that_reads_none() -> None:
    with pytest.raises(ConfigError, match="reads no layer"):
        Strategy(layers=(3,)).plan(TOWERS["with CLS"])


def test_layers_are_mapped_to_the_depth_of_the_tower() -> None:
    facts = TOWERS["with CLS"]
    assert [facts.scale(layer, 24) for layer in (0, 8, 16, 22, 23)] == [0, 4, 8, 11, 11]


def test_a_strategy_must_decide() -> None:
    with pytest.raises(NotImplementedError, match=r"Reads must define score\(\) or select\(\)"):
        Reads().select(Signals(torch.ones(1, 4, 2)), 2)


def signals() -> Signals:
    values = {
        ClsRow(10): torch.full((2, 3), 10.0),
        Keys(10): torch.zeros(2, 3, 4),
        ClsRow(8): torch.full((2, 3), 8.0),
    }
    tokens, text = torch.arange(12.0).view(2, 3, 2), [torch.zeros(1, 2), torch.ones(2, 2)]
    return Signals(tokens, (1, 1, 3), torch.tensor([0, 1]), values, text)


def test_stack_is_in_layer_order() -> None:
    stacked = signals().stack(ClsRow, Received)
    assert stacked.shape == (2, 2, 3)
    assert stacked[:, 0, 0].tolist() == [8.0, 10.0]
    assert signals().stack(Keys).shape == (1, 2, 3, 4)


def test_a_missing_quantity_is_named() -> None:
    with pytest.raises(InputError, match=r"no Received; they hold: ClsRow\(layer=10\), Keys"):
        signals().stack(Received)
    with pytest.raises(InputError, match="no ClsRow or Received; they hold: none"):
        Signals(torch.ones(1, 2, 3)).stack(ClsRow, Received)


def test_rows_of_signals() -> None:
    picked = signals().rows(torch.tensor([1]))
    assert torch.equal(picked.tokens, signals().tokens[1:])
    assert picked.n == 3
    assert picked.grid == (1, 1, 3)
    assert picked.item is not None
    assert picked.item.tolist() == [1]
    assert picked.text is not None
    assert [t.shape[0] for t in picked.text] == [2]
    assert all(len(value) == 1 for value in picked.values.values())
    assert picked.size is None
    sizes = torch.tensor([[1.0, 1.0, 2.0], [3.0, 1.0, 1.0]])
    picked = replace(signals(), size=sizes).rows(torch.tensor([1]))
    assert picked.size is not None
    assert picked.size.tolist() == [[3.0, 1.0, 1.0]]


def test_a_plain_selection_copies() -> None:
    x = torch.arange(24.0).view(2, 4, 3)
    selection = Selection(torch.tensor([[0, 3], [1, 2]]), 4)
    assert torch.equal(selection.apply(x), torch.stack([x[0, [0, 3]], x[1, [1, 2]]]))
    assert torch.equal(selection.slots, selection.rows)
    assert not selection.is_identity
    assert torch.equal(selection.row(1).apply(x[1:]), selection.apply(x)[1:])


def test_the_identity() -> None:
    x = torch.arange(24.0).view(2, 4, 3)
    selection = Selection.all(2, 4, x.device)
    assert selection.is_identity
    assert torch.equal(selection.apply(x), x)


def mixed() -> Selection:
    """A new row first, token 2 as it is, and 0 merged with the mean of 1 and 3."""
    mix = Mix(
        source=torch.tensor([[4, 2, 0, 1, 3]] * 2),
        target=torch.tensor([[0, 1, 2, 2, 2]] * 2),
        weight=torch.tensor([[1.0, 1.0, 1.0, 0.5, 0.5]] * 2),
    )
    return Selection(torch.tensor([[-1, 2, 0]] * 2), 4, mix)


def test_a_mix_adds_what_flows_into_each_output() -> None:
    x = torch.arange(30.0).view(2, 5, 3)
    want = torch.stack([x[:, 4], x[:, 2], x[:, 0] + (x[:, 1] + x[:, 3]) / 2], dim=1)
    assert torch.equal(mixed().apply(x), want)
    assert torch.equal(mixed().row(1).apply(x[1:]), want[1:])
    assert not mixed().is_identity


def test_a_total_is_over_all_that_an_output_is_made_of() -> None:
    sizes = torch.tensor([[1.0, 2.0, 4.0, 8.0, 16.0]] * 2)
    assert mixed().total(sizes).tolist() == [[16.0, 4.0, 11.0]] * 2
    plain = Selection(torch.tensor([[0, 3], [1, 2]]), 4)
    assert plain.total(sizes[:, :4]).tolist() == [[1.0, 8.0], [2.0, 4.0]]


def test_new_rows_take_the_lowest_free_slots() -> None:
    assert mixed().slots.tolist() == [[1, 2, 0]] * 2
    none = torch.zeros(2, 0, dtype=torch.int64)
    rows = torch.tensor([[-1, 0, -1, 3], [5, -1, 1, -1]])
    selection = Selection(rows, 6, Mix(none, none, none.float()))
    assert selection.slots.tolist() == [[1, 0, 2, 3], [5, 0, 1, 2]]
