"""Keep all is bit-identical; dropping tokens equals hiding them from the full-length model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import pytest
import torch
from torch import Tensor

import vtprune
from tests import tiny
from tests.contracts.bank import ELSEWHERE
from tests.hidden import Watch
from tests.probes import generate
from vtprune.engine import compaction, encoder
from vtprune.registry import build, keeping_names, strategy_class
from vtprune.types import Budget, Signals, Site, Strategy

NAMES = [
    name
    for name in keeping_names()
    if not strategy_class(name).acts_inside and name not in ELSEWHERE
]
BATCHES = {"one": tiny.one_image, "ragged": tiny.ragged}
# What keeps a strategy out of the language model, where the reference drops nothing. VisionDrop
# stays in it: families/test_strategies.py holds it against one that does.
OUTSIDE = {"vscan": {"inside": False}}


@dataclass(frozen=True)
class Ragged(Strategy):
    """Keeps a half, a third and a quarter of the tokens of successive images."""

    kind: ClassVar[Literal["adaptive"]] = "adaptive"

    def counts(self, signals: Signals, budget: Budget) -> list[int]:
        assert signals.item is not None
        return [signals.n // (2 + int(i) % 3) for i in signals.item]

    def score(self, signals: Signals) -> Tensor:
        return signals.tokens.norm(dim=-1)


def assert_masks_only(model, inputs, strategy, policy, keep=9, **options) -> None:
    processor = tiny.Processor()
    watch = Watch()
    with (
        watch.watching(),
        vtprune.wrap(model, strategy, keep=keep, positions=policy, processor=processor) as handle,
    ):
        ids, logits = generate(model, inputs, **options)
        selections = handle.selections
        projected = all(step.stage.site is not Site.ENCODER for step in handle.steps)
    with watch.hiding(model, model):
        reference = tiny.Reference.of(model, inputs, selections, policy, projected=projected)
    wanted_ids, wanted = reference.greedy(10)
    assert torch.equal(ids, wanted_ids)
    assert (logits - wanted).abs().max() < 1e-4


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.parametrize("shape", BATCHES)
@pytest.mark.parametrize("name", NAMES)
def test_keep_all_is_bit_identical(name, shape, tower, attention):
    model, inputs = tiny.build(tower, attention), BATCHES[shape]()
    ids, logits = generate(model, inputs)
    plain = model(**inputs).logits
    for keep in (1.0, tiny.N):
        with vtprune.wrap(model, name, keep=keep, processor=tiny.Processor()) as handle:
            kept_ids, kept_logits = generate(model, inputs)
            assert torch.equal(ids, kept_ids)
            assert torch.equal(logits, kept_logits)
            assert torch.equal(plain, model(**inputs).logits)
            assert all(image.kept == tiny.N for image in handle.report().images)


@pytest.mark.parametrize("policy", ["keep", "renumber"])
@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.parametrize("shape", BATCHES)
@pytest.mark.parametrize("name", [name for name in NAMES if name != "visiondrop"])
def test_gather_equals_mask(name, shape, tower, policy):
    strategy = build(name, **OUTSIDE.get(name, {}))
    assert_masks_only(tiny.build(tower), BATCHES[shape](), strategy, policy)


@pytest.mark.parametrize("policy", ["keep", "renumber"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_ragged_counts(tower, attention, policy):
    assert_masks_only(tiny.build(tower, attention), tiny.ragged(), Ragged(), policy)


@pytest.mark.parametrize("policy", ["keep", "renumber"])
@pytest.mark.parametrize("options", [{"cache_implementation": "static"}, {"use_cache": False}])
def test_caches(options, policy):
    for inputs in (tiny.one_image(), tiny.ragged()):
        assert_masks_only(tiny.build(), inputs, "fastervlm", policy, **options)


def test_stages_in_order():
    model, inputs = tiny.build(), tiny.ragged()
    with vtprune.wrap(model, ["visionzip", "divprune"], keep=[20, 9]) as handle:
        ids, logits = generate(model, inputs)
        selections = handle.selections
    assert [image.kept for image in handle.report().images] == [9, 9, 9]
    assert all(s.n == tiny.N and s.slots.unique().numel() == 9 for s in selections)
    wanted_ids, wanted = tiny.Reference.of(model, inputs, selections, "renumber").greedy(10)
    assert torch.equal(ids, wanted_ids)
    assert (logits - wanted).abs().max() < 1e-4
    with (
        vtprune.wrap(model, ["visionzip", "fastervlm"], keep=[20, 9]),
        pytest.raises(vtprune.UnsupportedError, match="first"),
    ):
        model.generate(**inputs, max_new_tokens=1)


def test_an_image_does_not_depend_on_its_batch():
    model, inputs = tiny.build(), tiny.ragged()
    alone = {
        "input_ids": inputs["input_ids"][1:],
        "attention_mask": inputs["attention_mask"][1:],
        "pixel_values": inputs["pixel_values"][1:],
    }
    for name in NAMES:
        with vtprune.wrap(model, name, keep=9, processor=tiny.Processor()) as handle:
            generate(model, inputs, n=1)
            together = [s.rows for s in handle.selections[1:]]
            generate(model, alone, n=1)
            assert all(
                torch.equal(a, b.rows) for a, b in zip(together, handle.selections, strict=True)
            )


def test_a_wrong_position_turns_the_oracle_red(monkeypatch):
    right = compaction.gather_positions

    def late(positions, index, policy):
        return right(positions, index, policy) + (index > 20)

    monkeypatch.setattr(compaction, "gather_positions", late)
    with pytest.raises(AssertionError):
        assert_masks_only(tiny.build(), tiny.ragged(), "fastervlm", "keep")


def test_swapped_tokens_turn_the_oracle_red(monkeypatch):
    right = encoder.survive

    def swapped(images, chosen, later):
        after = right(images, chosen, later)
        after.tokens = [x.flip(0) for x in after.tokens]
        return after

    monkeypatch.setattr(encoder, "survive", swapped)
    with pytest.raises(AssertionError):
        assert_masks_only(tiny.build(), tiny.ragged(), "divprune", "keep")


def test_a_missing_mask_turns_the_oracle_red(monkeypatch):
    monkeypatch.setattr(vtprune.Handle, "_fill_mask", lambda *a: None)
    with pytest.raises(AssertionError):
        assert_masks_only(tiny.build(), tiny.one_image(), "strided", "keep", use_cache=False)


def test_strategy_instances_work_like_names():
    model, inputs = tiny.build(), tiny.one_image()
    results = []
    for strategy in ("vtc_cls", build("vtc_cls", start=16)):
        with vtprune.wrap(model, strategy, keep=0.25):
            results.append(generate(model, inputs)[1])
    assert torch.equal(*results)
