"""Stages that merge in the tower: between attention and MLP or after a block, weighed by size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import vtprune
from tests import tiny
from tests.engine.test_oracles import assert_masks_only
from vtprune.engine import blocks, reduction, tap, tower
from vtprune.engine.plan import find_adapter
from vtprune.registry import build
from vtprune.types import (
    Budget,
    ClsRow,
    Facts,
    Flow,
    Keys,
    Mix,
    Received,
    Selection,
    Signals,
    Site,
    Stage,
    Strategy,
    TowerNeed,
    WideClsRow,
    WideKeys,
)

TOWERS = ("clip", "siglip")


@dataclass(frozen=True)
class Sums(Strategy):
    """Adds neighbours to each other after two blocks, in falling order."""

    proportional: bool = True

    def plan(self, facts: Facts) -> tuple[Stage, ...]:
        return tuple(
            Stage(Site.ENCODER, (Received(layer),), layer, proportional=self.proportional)
            for layer in (0, 1)
        )

    def counts(self, signals: Signals, budget: Budget) -> list[int]:
        assert signals.size is not None
        assert signals.size.sum(1).tolist() == [float(tiny.N)] * len(signals.tokens)
        return [signals.n // 2] * len(signals.tokens)

    def select(self, signals: Signals, k: int) -> Selection:
        batch, n = signals.tokens.shape[:2]
        source = torch.arange(n)
        rows = 2 * torch.arange(k).flip(0)
        target = (k - 1 - source // 2).clamp(min=0)
        weight = signals.stack(Received)[-1] * 9
        return Selection(
            rows.expand(batch, k),
            n,
            Mix(source.expand(batch, n), target.expand(batch, n), weight),
        )


@dataclass(frozen=True)
class Foreign(Strategy):
    """Makes its outputs of the prefix."""

    def plan(self, facts: Facts) -> tuple[Stage, ...]:
        return (Stage(Site.ENCODER, (), 0, before_mlp=True),)

    def select(self, signals: Signals, k: int) -> Selection:
        order = torch.arange(k).expand(len(signals.tokens), k)
        mix = Mix(signals.n + order, order, torch.ones(order.shape))
        return Selection(order, signals.n, mix)


STRATEGIES = [
    build("tome", layers=(1,)),
    build("tome", layers=(2,)),
    build("tome", layers=(0, 2)),
    build("tome", prop_attn=False),
    build("pitome", layers=(0, 2), prop_attn=True),
    build("tofu", layers=(0, 2)),
    build("diffrate"),
    build("evit", layers=(0, 1)),
    build("evit", fuse=False),
    Sums(),
    Sums(proportional=False),
]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", TOWERS)
@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_merging_equals_writing_and_hiding(strategy, name, attention):
    for inputs in (tiny.one_image(), tiny.ragged()):
        assert_masks_only(tiny.build(name, attention), inputs, strategy, "keep")


def without_log_size(tiles: Any, n_prefix: int) -> None:
    return None


def forgetful(selection: Selection, x: Tensor) -> Tensor:
    return x.gather(1, selection.rows)


def something(self: blocks._Nothing, hidden_states: Tensor, *_: Any, **__: Any) -> Any:
    return (hidden_states, None) if self.weights else hidden_states


@pytest.mark.parametrize("name", TOWERS)
@pytest.mark.parametrize(
    ("where", "what", "fault"),
    [
        (blocks, "_log_sizes", without_log_size),
        (Selection, "total", forgetful),
        (blocks._Nothing, "forward", something),
    ],
)
def test_faults_turn_the_oracle_red(where, what, fault, name, monkeypatch):
    monkeypatch.setattr(where, what, fault)
    with pytest.raises(AssertionError):
        assert_masks_only(tiny.build(name), tiny.ragged(), "tome", "keep")


def test_a_merge_after_the_mlp_turns_the_oracle_red(monkeypatch):
    right = blocks.Blocks.advance

    def late(self: Any, tiles: Any, number: int, proportional: bool, skip: Any = None) -> None:
        if skip != self.attention:
            right(self, tiles, number, proportional)

    monkeypatch.setattr(blocks.Blocks, "advance", late)
    with pytest.raises(AssertionError):
        assert_masks_only(tiny.build(), tiny.ragged(), "tome", "keep")


@pytest.mark.parametrize("name", TOWERS)
def test_every_block_merges_equally_many_before_its_mlp(name, monkeypatch):
    model, inputs, lengths = tiny.build(name), tiny.ragged(), []
    right = tower.Blocks.advance

    def advance(self: Any, tiles: Any, number: int, proportional: bool, skip: Any) -> None:
        right(self, tiles, number, proportional, skip)
        lengths.append((number, skip, {len(tile.alive) for tile in tiles}))

    monkeypatch.setattr(tower.Blocks, "advance", advance)
    with vtprune.wrap(model, "tome", keep=14) as handle:
        model.generate(**inputs, max_new_tokens=1)
    assert [image.kept for image in handle.report().images] == [14] * 3
    assert lengths == [
        (0, "mlp", {36}),
        (0, "self_attn", {28}),
        (1, "mlp", {28}),
        (1, "self_attn", {21}),
        (2, "mlp", {21}),
        (2, "self_attn", {14}),
    ]


@pytest.mark.parametrize("keep", [1, 2, 5, 35])
@pytest.mark.parametrize("name", TOWERS)
def test_any_budget_is_met(name, keep):
    model, inputs = tiny.build(name), tiny.ragged()
    with vtprune.wrap(model, "tome", keep=keep) as handle:
        model.generate(**inputs, max_new_tokens=1)
        assert all(s.rows.diff().gt(0).all() for s in handle.selections)
    assert [image.kept for image in handle.report().images] == [keep] * 3


@pytest.mark.parametrize("name", TOWERS)
def test_two_halves_make_the_whole_block(name):
    model = tiny.build(name)
    layers = list(model.model.vision_tower.encoder.layers)
    states = torch.randn(2, 10, 32, generator=torch.Generator().manual_seed(0))
    made = []
    for skips in ((None,), ("mlp", "self_attn")):
        run = blocks.Blocks(layers, lambda block, x, mask: block(x, mask), tap.Tap({}, 1), 1)
        tiles = [
            blocks.Tile(0, [Budget(1)], row, torch.arange(9), torch.ones(9).bool(), {})
            for row in states
        ]
        with torch.no_grad():
            for skip in skips:
                run.advance(tiles, 0, True, skip)
        made.append(torch.stack([tile.states for tile in tiles]))
    assert torch.equal(*made)


def test_the_blocks_are_put_back_even_after_an_error(monkeypatch):
    model, inputs = tiny.build(), tiny.one_image()
    layer = model.model.vision_tower.encoder.layers[0]
    parts = dict(layer.named_children())

    def broken(*args: Any) -> None:
        raise KeyError("a fault of the model's own")

    monkeypatch.setattr(layer.layer_norm1, "forward", broken)
    with vtprune.wrap(model, "tome", keep=9), pytest.raises(KeyError):
        model.generate(**inputs, max_new_tokens=1)
    monkeypatch.undo()
    assert dict(layer.named_children()) == parts
    with vtprune.wrap(model, "tome", keep=9):
        model.generate(**inputs, max_new_tokens=1)
    assert list(layer.named_children()) == list(parts.items())


def test_what_is_not_made_of_patches_is_refused():
    model, inputs = tiny.build(), tiny.one_image()
    with (
        vtprune.wrap(model, Foreign(), keep=1),
        pytest.raises(vtprune.UnsupportedError, match=r"tokens of \[CLS\] between"),
    ):
        model.generate(**inputs, max_new_tokens=1)


def test_new_tokens_have_no_quantities_of_earlier_blocks():
    model, inputs = tiny.build(), tiny.ragged()
    with vtprune.wrap(model, ["evit(layers=(0,))", "fastervlm"], keep=[20, 9]) as handle:
        model.generate(**inputs, max_new_tokens=1)
    assert [image.kept for image in handle.report().images] == [9] * 3
    last = find_adapter(model).facts.feature_block
    with (
        vtprune.wrap(model, [f"evit(layers=({last},))", "fastervlm"], keep=[20, 9]),
        pytest.raises(vtprune.UnsupportedError, match="runs before new tokens are made"),
    ):
        model.generate(**inputs, max_new_tokens=1)


def test_a_block_without_an_mlp_of_that_name_is_refused():
    model, inputs = tiny.build(), tiny.one_image()
    layer = model.model.vision_tower.encoder.layers[0]
    layer.feed_forward = layer.mlp
    del layer.mlp
    with (
        vtprune.wrap(model, "tome", keep=9),
        pytest.raises(vtprune.UnsupportedError, match="has no 'mlp'"),
    ):
        model.generate(**inputs, max_new_tokens=1)


def test_an_attention_that_takes_no_mask_is_refused_unless_sizes_do_not_count(monkeypatch):
    model, inputs = tiny.build(), tiny.one_image()
    config = model.model.vision_tower.config
    monkeypatch.setattr(config, "_attn_implementation_internal", "flex_attention")
    with (
        vtprune.wrap(model, "tome", keep=9),
        pytest.raises(vtprune.UnsupportedError, match="'flex_attention' does not take"),
    ):
        model.generate(**inputs, max_new_tokens=1)


def probabilities(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    return (q @ k.mT * q.shape[-1] ** -0.5 + mask).softmax(-1).mean(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_is_read_with_the_weight_of_sizes(dtype):
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 9, 8, generator=generator).to(dtype)
    sizes = torch.randint(1, 6, (2, 9), generator=generator).float()
    mask = sizes.log()[:, None, None].to(dtype)
    needs: list[TowerNeed] = [kind(0) for kind in (ClsRow, Received, WideClsRow, Flow)]
    module = torch.nn.Identity()
    reader = tap.Tap({module: [*needs, Keys(0), WideKeys(0)]}, 1)
    reader.read(module, q, k, mask, None, v)
    q, k, mask = q.float(), k.float(), mask.float()
    wide = probabilities(reduction._wide(q), reduction._wide(k), mask)[:, 0, 1:]
    every = probabilities(q, k, mask)
    read = [reader.value(need).unflatten(0, (2, -1)) for need in needs]
    right = [every[:, 0, 1:], every.mean(1)[:, 1:], wide]
    right.append(right[0] / right[0].sum(1, keepdim=True))
    for value, expected in zip([*read[:3], read[3][..., 0]], right, strict=True):
        torch.testing.assert_close(value, expected)
    assert torch.equal(reader.value(Keys(0)).unflatten(0, (2, -1)), k.mean(1)[:, 1:])
    assert reader.value(WideKeys(0)).shape == (16, 32)
