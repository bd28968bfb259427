"""Strategies in a list, one after the other, held against the oracles."""

from __future__ import annotations

from typing import Any

import pytest

import vtprune
from tests.families.oracles import gather_is_mask, inputs_of, keeps_all, model_of
from tests.families.test_strategies import FAMILIES
from tests.probes import generate
from vtprune.engine.plan import find_adapter
from vtprune.registry import build
from vtprune.strategies.transprune import TransPrune

# By name: the strategies, and what each keeps of what the one before it has left. A pair is a name
# and the layer of the language model that it acts before, counted from the end.
LISTS: dict[str, tuple[list[Any], list[float]]] = {
    "visionzip, transprune": (["visionzip", "transprune"], [0.6, 0.6]),
    "vispruner, transprune without instruction": (
        ["vispruner", TransPrune(instruction=False)],
        [0.8, 0.6],
    ),
    "divprune, sparsevlm": (["divprune", "sparsevlm"], [0.7, 0.6]),
    "todre, pyramiddrop": (["todre", "pyramiddrop"], [0.7, 0.6]),
    "visionzip, fastv, dart": (["visionzip", ("fastv", 2), ("dart", 1)], [0.7, 0.6, 0.6]),
}


def given(family: str, listed: str) -> dict[str, Any]:
    model, processor = model_of(family)
    depth = find_adapter(model).facts.decoder_layers
    strategies = [
        build(one[0], layers=(depth - one[1],)) if isinstance(one, tuple) else one
        for one in LISTS[listed][0]
    ]
    return {"strategy": strategies, "keep": LISTS[listed][1], "processor": processor}


@pytest.mark.parametrize("listed", LISTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_gather_equals_mask(family, listed):
    wrap = given(family, listed)
    report = gather_is_mask(family, inputs_of(family, "ragged"), wrap, steps=10).report()
    assert any(image.kept < image.tokens for image in report.images)
    assert any(stage.kept < stage.tokens for stage in report.stages)


@pytest.mark.parametrize("family", FAMILIES)
def test_keep_all_is_bit_identical(family):
    wrap = {**given(family, "visionzip, transprune"), "keep": [1.0, 1.0]}
    keeps_all(family, "ragged", **wrap)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_fewer_tokens_compute_less(family):
    model, inputs = model_of(family)[0], inputs_of(family, "ragged")
    listed = ["visionzip", build("shortv", layers=(2, 3))]
    with vtprune.wrap(model, "visionzip", keep=0.5) as handle:
        generate(model, inputs, 10)
        alone = handle.report().prefill()
    with vtprune.wrap(model, listed, keep=0.5) as handle:
        generate(model, inputs, 10)
        both = handle.report().prefill()
    assert both.flops < alone.flops
