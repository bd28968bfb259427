"""Edited attention and sparse prefills on every family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import vtprune
from tests.engine.edits_reference import changed, greedy
from tests.families.oracles import inputs_of, model_of, plain
from tests.families.test_computing import visual_of
from tests.probes import generate
from tests.strategies.test_interventions import redistributed
from vtprune import UnsupportedError
from vtprune.engine.plan import find_adapter
from vtprune.eval import tiny
from vtprune.registry import build
from vtprune.strategies.psa import PSA

STEPS = 3
SLOW = pytest.mark.slow
FAMILIES = [
    pytest.param(family, marks=[] if family == "qwen2_5_vl" else SLOW) for family in tiny.names()
]
WHOLE = ("gemma3", "paligemma")  # whose images see themselves whole


def looking(model: Any, inputs: dict[str, Tensor], factor: float) -> Any:
    """By hand: rows of the text after the image look ``factor`` times as much at visual tokens."""

    def change(number: int, shares: Tensor, entered: Tensor) -> Tensor:
        visual = visual_of(model, inputs, shares.shape[3])
        edited = shares.clone()
        for b, own in enumerate(visual):
            if own.any():
                last = int(own.nonzero()[-1])
                edited[b, :, last + 1 :, own] *= factor
                edited[b, :, last + 1 :] /= edited[b, :, last + 1 :].sum(-1, keepdim=True)
        there = inputs["attention_mask"].bool()
        more = shares.shape[2] - there.shape[1]
        rows = torch.nn.functional.pad(there, (0, more), value=True)[:, None, :, None]
        return torch.where(rows, edited, shares)

    return change


@pytest.mark.parametrize("family", FAMILIES)
def test_an_edit_equals_the_one_by_hand_and_none_is_none(family):
    model, eager, inputs = (
        model_of(family)[0],
        model_of(family, "eager")[0],
        inputs_of(family, "ragged"),
    )
    with vtprune.wrap(model, build("rescale_attention", factor=1.0, queries="all")):
        assert torch.equal(generate(model, inputs, 10)[1], plain(family, "ragged")[1])
    with vtprune.wrap(model, build("rescale_attention", factor=4.0)):
        ids, logits = generate(model, inputs, STEPS)
    layers: Any = find_adapter(eager).decoder
    with changed(layers, weights=looking(eager, inputs, 4.0)):
        wanted_ids, wanted = greedy(eager, inputs, STEPS)
    assert torch.equal(ids, wanted_ids)
    assert (logits - wanted).abs().max() < 1e-4
    assert (logits - plain(family, "ragged")[1][:, :STEPS]).abs().max() > 1e-3


@SLOW
def test_behind_a_sliding_window_keys_are_those_that_are_left():
    """Layers of Gemma 3 forget what is further back than the window while tokens are decoded."""
    inputs, logits = inputs_of("gemma3", "ragged"), []
    window = inputs["input_ids"].shape[1] // 2
    for attention in ("sdpa", "eager"):
        model: Any = tiny.build("gemma3", attention)[0]
        decoder: Any = find_adapter(model).decoder
        model.config.text_config.sliding_window = window
        model.model.language_model.config.sliding_window = window
        for layer in decoder:
            if layer.self_attn.sliding_window:
                layer.self_attn.sliding_window = window
        if attention == "eager":
            logits.append(generate(model, inputs, 6)[1])
            with changed(decoder, weights=looking(model, inputs, 4.0)):
                logits.append(greedy(model, inputs, 6)[1])
        else:
            assert {bool(layer.self_attn.sliding_window) for layer in decoder} >= {True}
            with vtprune.wrap(model, build("rescale_attention", factor=4.0)):
                logits.append(generate(model, inputs, 6)[1])
    made, plain_logits, wanted = logits
    assert (made - wanted).abs().max() < 1e-4
    assert (made - plain_logits).abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prefill_of_whole_blocks_is_as_ever_and_a_sparse_one_is_not(family):
    model, inputs = model_of(family)[0], inputs_of(family, "ragged")
    every = PSA(bounds=(1.0, 1.0, 1.0, 1.0), block=8, stride=4, alike=False, text=0)
    few = PSA(bounds=(0.2, 0.4, 0.6, 0.8), block=8, stride=4, text=0)
    if family in WHOLE:
        with (
            vtprune.wrap(model, every),
            pytest.raises(UnsupportedError, match="does not attend in the order of tokens"),
        ):
            model(**inputs)
        return
    ids, logits, _ = plain(family, "ragged")
    with vtprune.wrap(model, every):
        same_ids, same = generate(model, inputs, 10)
    assert torch.equal(ids, same_ids)
    assert (logits - same).abs().max() < 1e-4
    with vtprune.wrap(model, few) as handle:
        assert not torch.equal(generate(model, inputs, 1)[1], logits[:, :1])
        rules = handle.report().rules
    assert rules is not None
    assert all(0 < share < 1 for share in rules.densities.values())


@pytest.mark.parametrize("family", ["qwen2_5_vl", pytest.param("llava_next", marks=SLOW)])
def test_var_moves_attention_from_sinks_to_the_image(family):
    model, eager = model_of(family)[0], model_of(family, "eager")[0]
    inputs, layers = inputs_of(family, "ragged"), (1, 2)
    with vtprune.wrap(model, build("var", tau=1.5, layers=layers)):
        ids, logits = generate(model, inputs, STEPS)
    visual = visual_of(eager, inputs, inputs["input_ids"].shape[1])
    decoder: Any = find_adapter(eager).decoder
    by_hand = redistributed(inputs, layers, None, 1.5, 0.6, visual)
    with changed(decoder, weights=by_hand):
        wanted_ids, wanted = greedy(eager, inputs, STEPS)
    assert torch.equal(ids, wanted_ids)
    assert (logits - wanted).abs().max() < 1e-4
    assert (logits - plain(family, "ragged")[1][:, :STEPS]).abs().max() > 1e-4
