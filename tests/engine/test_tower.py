"""Stages between the blocks of the tower: what is read, what runs on less, what is refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import Tensor

import vtprune
from tests import tiny
from tests.engine.test_oracles import assert_masks_only
from tests.families.eager import flow
from tests.hidden import Watch
from vtprune.engine import reduction, tap, tower
from vtprune.registry import build
from vtprune.types import (
    Budget,
    ClsRow,
    Facts,
    Flow,
    Need,
    Received,
    Signals,
    Site,
    Stage,
    Strategy,
)

TOWERS = ("clip", "siglip")


@dataclass(frozen=True)
class Second(Strategy):
    """Reads a quantity of one block after the projector."""

    need: Need

    def needs(self, facts: Facts) -> tuple[Need, ...]:
        return (self.need,)

    def score(self, signals: Signals) -> Tensor:
        return signals.stack(ClsRow, Received)[-1]


@dataclass(frozen=True)
class Uneven(Strategy):
    """Drops different numbers of tokens of each image after three blocks."""

    kind: ClassVar[Literal["adaptive"]] = "adaptive"

    def plan(self, facts: Facts) -> tuple[Stage, ...]:
        last = (Received(0), Received(2))
        return tuple(
            Stage(Site.ENCODER, needs, layer)
            for layer, needs in ((0, (Received(0),)), (1, (Received(0), Received(1))), (2, last))
        )

    def counts(self, signals: Signals, budget: Budget) -> list[int]:
        assert signals.item is not None
        return [signals.n - 4 - 3 * int(i) for i in signals.item]

    def score(self, signals: Signals) -> Tensor:
        return signals.stack(Received).sum(0)


@pytest.mark.parametrize("n_prefix", [0, 1])
def test_flow_by_its_definition(n_prefix):
    q, k, v = torch.randn(3, 2, 4, 9, 8, generator=torch.Generator().manual_seed(0))
    module = torch.nn.Identity()
    reader = tap.Tap({module: [Flow(0)]}, n_prefix)
    reader.read(module, q, k, None, None, v)
    value = reader.value(Flow(0)).unflatten(0, (2, -1))
    torch.testing.assert_close(value, flow(q, k, v, n_prefix))


def test_flow_by_hand():
    # One head of width 1: CLS has q = 0, so its attention is even over all; values 0 | 2 and -1.
    q, k = torch.zeros(1, 1, 3, 1), torch.tensor([5.0, 1.0, 2.0]).view(1, 1, 3, 1)
    v = torch.tensor([0.0, 2.0, -1.0]).view(1, 1, 3, 1)
    value = reduction._flow(q, k, v, None, 1)
    torch.testing.assert_close(value, torch.tensor([[[0.5, 2.0], [0.5, 1.0]]]))


@pytest.mark.parametrize("name", TOWERS)
def test_later_blocks_run_on_fewer_tokens_and_the_budget_is_met(name, monkeypatch):
    model, inputs, lengths = tiny.build(name), tiny.ragged(), []
    right = tower.Blocks.advance

    def advance(self: Any, tiles: Any, number: int, *args: Any, **kwargs: Any) -> None:
        lengths.append((number, sorted(len(tile.alive) for tile in tiles)))
        right(self, tiles, number, *args, **kwargs)

    monkeypatch.setattr(tower.Blocks, "advance", advance)
    with vtprune.wrap(model, "flowcut", keep=9, layers=(0, 1)) as handle:
        model.generate(**inputs, max_new_tokens=1)
    assert [image.kept for image in handle.report().images] == [9] * 3
    assert lengths == [(1, [tiny.N] * 3), (2, [9] * 3)]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", TOWERS)
@pytest.mark.parametrize("strategy", [build("flowcut", layers=(0, 2)), Uneven()], ids=str)
def test_several_stages_equal_hiding(strategy, name, attention):
    for inputs in (tiny.one_image(), tiny.ragged()):
        assert_masks_only(tiny.build(name, attention), inputs, strategy, "keep")


def test_images_of_different_lengths():
    model, inputs = tiny.build(), tiny.ragged()
    with vtprune.wrap(model, Uneven(), keep=9) as handle:
        model.generate(**inputs, max_new_tokens=1)
    assert [image.kept for image in handle.report().images] == [
        tiny.N - 12,
        tiny.N - 21,
        tiny.N - 30,
    ]


@pytest.mark.parametrize("first_step", ["flowcut", "tome"])
@pytest.mark.parametrize("name", TOWERS)
def test_what_later_steps_read_is_of_the_survivors(name, first_step):
    need = ClsRow(1) if name == "clip" else Received(1)
    model, inputs = tiny.build(name), tiny.ragged()
    with vtprune.wrap(model, [first_step, Second(need=need)], keep=[20, 9]) as handle:
        model.generate(**inputs, max_new_tokens=1)
        both = [s.rows[0].tolist() for s in handle.selections]
    with vtprune.wrap(model, first_step, keep=20) as handle:
        model.generate(**inputs, max_new_tokens=1)
        first = [s.rows[0].tolist() for s in handle.selections]
    assert [len(rows) for rows in both] == [9] * 3
    assert all(set(a) < set(b) for a, b in zip(both, first, strict=True))


def test_what_later_steps_cannot_be_given_is_refused():
    model, inputs = tiny.build(), tiny.one_image()
    with (
        vtprune.wrap(model, ["flowcut", Second(need=ClsRow(3))], keep=[20, 9]),
        pytest.raises(vtprune.UnsupportedError, match="flowcut has let tokens leave"),
    ):
        model.generate(**inputs, max_new_tokens=1)


def test_a_stage_inside_the_language_model_may_follow_and_none_in_the_tower():
    model, inputs = tiny.build(), tiny.one_image()
    with vtprune.wrap(model, ["flowcut", "fastv"], keep=[20, 9]) as handle:
        model.generate(**inputs, max_new_tokens=2)
        assert [image.kept for image in handle.report().images] == [20]
    with pytest.raises(vtprune.UnsupportedError, match="must come first"):
        vtprune.wrap(model, ["fastervlm", "flowcut"], keep=[20, 9])


def test_a_cut_that_is_not_hidden_turns_the_oracle_red():
    model, inputs, watch = tiny.build(), tiny.one_image(), Watch()
    with watch.watching(), vtprune.wrap(model, "flowcut", keep=9) as handle:
        logits = model(**inputs).logits[:, -1]
        selections = handle.selections
    with watch.hiding(model, model):
        right = tiny.Reference.of(model, inputs, selections, "renumber").greedy(1)[1][:, 0]
    wrong = tiny.Reference.of(model, inputs, selections, "renumber").greedy(1)[1][:, 0]
    assert (logits - right).abs().max() < 1e-4
    assert (logits - wrong).abs().max() > 1e-2
