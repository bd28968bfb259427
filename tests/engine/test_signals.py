"""What a strategy reads under sdpa equals what an eager copy's probabilities give."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import pytest
import torch
from torch import Tensor

import vtprune
from tests import tiny
from tests.probes import Spy
from vtprune.engine import reduction, tap
from vtprune.types import (
    ClsRow,
    Facts,
    InstructionText,
    Keys,
    Received,
    Site,
    Stage,
    TowerNeed,
    WideClsRow,
    WideKeys,
)
from vtprune.vlm_adapters.llava import Llava


@dataclass(frozen=True)
class Inner(Spy):
    """Does so inside the tower."""

    def plan(self, facts: Facts) -> tuple[Stage, ...]:
        return (Stage(Site.ENCODER, self.wanted),)


def wanted(tower: str) -> tuple[TowerNeed, ...]:
    needs = [kind(layer) for kind in (Received, Keys, WideKeys) for layer in (0, 1, 2)]
    rows = [ClsRow(1), ClsRow(2), WideClsRow(1), WideClsRow(2)]
    return tuple(needs + (rows if tower == "clip" else []))


def expected(need: TowerNeed, tower: str, pixels: Tensor) -> Tensor:
    """The quantity from an eager copy: probabilities, or the projected keys."""
    vision = tiny.build(tower, "eager").model.vision_tower
    first = int(tower == "clip")
    projected: list[Tensor] = []
    attention = vision.encoder.layers[need.layer].self_attn
    parts = (attention.q_proj, attention.k_proj)
    hooks = [x.register_forward_hook(lambda m, i, out: projected.append(out)) for x in parts]
    with torch.no_grad():
        probabilities = vision(pixels, output_attentions=True).attentions[need.layer]
    for hook in hooks:
        hook.remove()
    queries, keys = projected
    if isinstance(need, WideKeys):
        return keys[:, first:]
    if isinstance(need, WideClsRow):
        return (queries[:, :1] @ keys.mT * 32**-0.5).softmax(-1)[:, 0, 1:]
    if isinstance(need, ClsRow):
        return probabilities[:, :, 0, 1:].mean(1)
    if isinstance(need, Received):
        return probabilities.mean((1, 2))[:, first:]
    return keys.unflatten(-1, (4, 8)).mean(2)[:, first:]


def check(tower: str, attention: str = "sdpa") -> None:
    spy, inputs = Spy(wanted=wanted(tower)), tiny.ragged()
    with vtprune.wrap(tiny.build(tower, attention), spy, keep=9) as handle:
        cast(Any, handle.model).generate(**inputs, max_new_tokens=1)
    (signals,) = spy.seen
    assert signals.tokens.shape == (3, tiny.N, 32)
    assert signals.grid == (1, 6, 6)
    for need in wanted(tower):
        value = signals.values[need]
        torch.testing.assert_close(value, expected(need, tower, inputs["pixel_values"]))
        assert (value - expected(need, tower, inputs["pixel_values"])).abs().max() < 1e-5


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_signals_equal_eager(tower, attention):
    check(tower, attention)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_inside_the_tower_the_block_after_the_features_sees_all_tokens(tower, attention):
    of_last = [type(need)(3) for need in wanted(tower) if need.layer == 2]
    needs = (*wanted(tower), *of_last)
    spy, inputs, model = Inner(wanted=needs), tiny.ragged(), tiny.build(tower, attention)
    with vtprune.wrap(model, spy, keep=9):
        for _ in range(2):
            model.generate(**inputs, max_new_tokens=1)
    assert len(spy.seen) == 2
    for signals in spy.seen:
        assert signals.values.keys() == set(needs)
        for need in needs:
            value = signals.values[need]
            assert value.shape[:2] == (3, tiny.N)
            assert (value - expected(need, tower, inputs["pixel_values"])).abs().max() < 1e-5, need


@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_the_same_tokens_follow(tower):
    model, inputs = tiny.build(tower), tiny.ragged()
    need = ClsRow(2) if tower == "clip" else Received(2)
    top = expected(need, tower, inputs["pixel_values"]).topk(9).indices.sort().values
    with vtprune.wrap(model, "fastervlm", keep=9) as handle:
        model.generate(**inputs, max_new_tokens=1)
        assert torch.equal(torch.cat([s.rows for s in handle.selections]), top)


def test_tap_one_layer_off_is_noticed(monkeypatch):
    right = Llava.attention
    monkeypatch.setattr(
        Llava, "attention", lambda self, modality, layer: right(self, modality, max(0, layer - 1))
    )
    with pytest.raises(AssertionError):
        check("clip")


def test_kept_cls_is_noticed(monkeypatch):
    right = tap.Tap._reduce

    def shifted(self, *args):
        n_prefix, self.n_prefix = self.n_prefix, 0
        value = right(self, *args)[:, :-1]
        self.n_prefix = n_prefix
        return value

    monkeypatch.setattr(tap.Tap, "_reduce", shifted)
    with pytest.raises(AssertionError):
        check("clip")


def test_permuted_heads_are_noticed(monkeypatch):
    right = reduction.attn_rows

    def permuted(q, k, *, scale=None):
        return right(q, k.flip(1), scale=scale)

    monkeypatch.setattr(reduction, "attn_rows", permuted)
    with pytest.raises(AssertionError):
        check("clip")


def test_wrong_scale_is_noticed(monkeypatch):
    right = reduction.attn_received
    monkeypatch.setattr(reduction, "attn_received", lambda q, k, **how: right(q, k, scale=1.0))
    with pytest.raises(AssertionError):
        check("siglip")


def test_text_reaches_the_strategy():
    class Processor:
        class tokenizer:
            all_special_ids = (0, 1, 2)

    spy, inputs, model = Spy(wanted=(InstructionText(),)), tiny.ragged(), tiny.build()
    with vtprune.wrap(model, spy, keep=9, processor=Processor):
        model.generate(**inputs, max_new_tokens=1)
    texts = spy.seen[0].text
    assert texts is not None
    assert [len(text) for text in texts] == [7, 4, 4]
    embed = model.get_input_embeddings()
    assert torch.equal(texts[1], embed(inputs["input_ids"][1, -4:]))
