"""The formulas against published figures and against the layers of real models."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import LlavaConfig, OPTConfig, Qwen3MoeConfig

import vtprune
from tests.golden_harness import GoldenError, check, find_adapter, find_cases
from tests.test_golden import SHIPPED
from vtprune import ConfigError, UnsupportedError
from vtprune.eval import tiny
from vtprune.flops import Cost, Shape, equivalent_tokens, schedule

VICUNA = Shape(4096, 11008, 32)
# SparseVLM at "192 tokens": tokens leave in layers 2, 6 and 15, after they were computed there.
SPARSEVLM = schedule((3, 576), (4, 309), (9, 204), (16, 113))


@pytest.mark.parametrize(
    ("entering", "tera"),
    [
        (schedule((7, 288), (2, 144), (3, 72), (20, 36)), 0.66),
        (schedule((7, 192), (2, 96), (3, 48), (20, 24)), 0.44),
        (schedule((32, 681)), 9.06 / 2),
    ],
)
def test_published_figures(entering, tera):
    assert VICUNA.prefill(entering) / 1e12 == pytest.approx(tera, abs=0.005)


def test_equivalent_tokens_by_either_convention():
    assert equivalent_tokens(SPARSEVLM) == 206.5
    assert equivalent_tokens(SPARSEVLM, at="outputs") == pytest.approx(192.03, abs=0.005)
    assert equivalent_tokens([64] * 3) == equivalent_tokens([64] * 3, at="outputs") == 64
    with pytest.raises(ConfigError, match="'inputs' or 'outputs'"):
        equivalent_tokens(SPARSEVLM, at="middle")  # type: ignore[arg-type]


def test_ways_of_counting_agree():
    shape = Shape(8, 20, 3, gated=False, queries=12, keys=4)
    by_hand = 0
    for n, m in ((5, 5), (5, 2), (2, 2)):
        by_hand += n * 8 * (12 + 12 + 4 + 4) + 2 * n * n * 12 + 2 * m * 8 * 20
    assert shape.prefill([5, 5, 2], ffn=[5, 2, 2]) == by_hand
    # Decoding from nothing is a prefill without the upper triangle of attention.
    n = 7
    upper = 3 * 2 * 12 * (n * n - n * (n - 1) // 2)
    assert shape.prefill([n] * 3) - shape.decode([0] * 3, n) == upper
    assert shape.decode([9] * 3, 0) == 0


def test_cost():
    cost = Cost(3, 4) + Cost(1, 4)
    assert (cost.macs, cost.flops, cost.share) == (4, 8, 0.5)
    assert Cost(0, 0).share == 1


@pytest.mark.parametrize("bad", [[9] * 31, [9] * 33, [9] * 31 + [-1]])
def test_a_number_for_each_layer(bad):
    with pytest.raises(ConfigError, match=r"has 32\. Give a number for each, 0 or more"):
        VICUNA.prefill(bad)


def test_bad_numbers():
    with pytest.raises(ConfigError, match="ffn=0 of a Shape"):
        Shape(8, 0, 2)
    with pytest.raises(ConfigError, match=r"keys=1\.5 of a Shape"):
        replace(VICUNA, keys=1.5)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"2\.5 layers"):
        schedule((2.5, 9))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="-1 new tokens"):
        VICUNA.decode([9] * 32, -1)


def linear(layer: Any) -> int:
    """Weights of a layer's projections: its MACs per token but for attention."""
    return sum(
        p.numel() for name, p in layer.named_parameters() if p.ndim > 1 and "gate." not in name
    )


@pytest.mark.parametrize("name", tiny.names())
def test_shapes_are_those_of_the_layers(name):
    if name == "smolvlm":
        pytest.importorskip("num2words")
    model, _ = tiny.build(name)
    with vtprune.wrap(model, "divprune", keep=0.5) as handle:
        adapter = handle.adapter
    parts = [(adapter.language_model.config, adapter.decoder)]
    parts += [(adapter.tower(m).config, adapter.blocks(m)) for m in adapter.modalities]
    for config, layers in parts:
        shape = Shape.of(config)
        assert shape.layers == len(layers)
        per_token = shape.layer(1, keys=0)
        if getattr(config, "num_experts", None):
            # All experts have weights; a token goes to some of them.
            share = config.num_experts_per_tok / config.num_experts
            mlp = linear(layers[0].mlp)
            assert per_token == linear(layers[0]) - mlp + mlp * share
        else:
            assert {linear(layer) for layer in layers} == {per_token}


def test_what_no_shape_is_known_of():
    with pytest.raises(UnsupportedError, match=r"layers of 'opt' are built.*Write the shape out"):
        Shape.of(OPTConfig())
    with pytest.raises(UnsupportedError, match="layers of None"):
        Shape.of(SimpleNamespace())
    with pytest.raises(ConfigError, match="Give its text_config or its vision_config"):
        Shape.of(LlavaConfig())
    mixed = Qwen3MoeConfig(mlp_only_layers=[0])
    vars(mixed)["model_type"] = "qwen3_vl_moe_text"
    with pytest.raises(UnsupportedError, match="layers with experts and layers without"):
        Shape.of(mixed)


@pytest.mark.parametrize("number", range(3))
def test_each_number_of_a_recorded_row_is_compared(number, tmp_path):
    case = find_cases(SHIPPED / "flops")[number]
    adapter = find_adapter("flops")
    assert not isinstance(adapter, str)
    shutil.copy(case.path, tmp_path)
    meta = json.loads(case.path.read_text())
    for i, row in enumerate(meta["cases"]):
        for name in (name for name, value in row.items() if isinstance(value, int | float)):
            rows = [dict(row) for row in meta["cases"]]
            rows[i][name] += 1 if isinstance(row[name], int) else 1e-9 * row[name]
            if "tera" in name:
                rows[i][name] += 1e-4
            (tmp_path / case.path.name).write_text(json.dumps(meta | {"cases": rows}))
            with pytest.raises(GoldenError, match=f"row {i}: "):
                check(find_cases(tmp_path)[0], adapter)


def test_a_row_must_be_read_and_answered(tmp_path):
    path = tmp_path / "c1.json"
    path.write_text(json.dumps({"method": "toy", "cases": [{"n": 2, "twice": 4, "more": 1}]}))
    (case,) = find_cases(tmp_path)
    with pytest.raises(GoldenError, match="row 0: more was neither read nor answered"):
        check(case, lambda params, row: {"twice": 2 * row["n"]})
    with pytest.raises(GoldenError, match="row 0: other differs: 1, recorded nan"):
        check(case, lambda params, row: {"twice": 2 * row["n"], "more": 1, "other": 1})
    path.write_text(json.dumps({"method": "toy", "tensors": {}, "cases": []}))
    with pytest.raises(GoldenError, match="records nothing"):
        check(find_cases(tmp_path)[0], lambda params, row: {})
