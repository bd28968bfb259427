"""Families without an adapter are served as far as transformers' contract goes, else refused."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import transformers as hf

import vtprune
from tests.engine.test_generation import OLD
from tests.families import strangers
from tests.families.batches import decoded, new_ids
from tests.families.merges import merging
from tests.families.reference import Reference

SERVED = [
    ("divprune", 0.5),
    ("random", 0.5),
    ("strided", 0.5),
    ("fastv", 0.5),
    ("dart", 0.5),
    ("pyramiddrop", 0.8),
    ("sparsevlm", 0.8),
    ("sparsevlm_plus", 0.8),
    ("transprune", 0.8),
]
# These have position ids with three axes, which stages that renumber cannot count anew.
MROPE = {"glm4v"}


@pytest.fixture(scope="module", params=strangers.BUILD)
def name(request: pytest.FixtureRequest) -> str:
    if request.param == "vipllava" and OLD:
        pytest.skip("transformers before 5.19 does not run it, wrapped or not")
    return request.param


@cache
def built(name: str, attention: str = "") -> tuple[Any, dict[str, Any], int]:
    return strangers.build(name, attention)


def test_keep_all_is_bit_identical(name: str) -> None:
    model, inputs, _ = built(name)
    ids, logits = new_ids(model, inputs), model(**inputs).logits
    for strategy, _ in SERVED:
        with vtprune.wrap(model, strategy, keep=1.0) as handle:
            assert torch.equal(new_ids(model, inputs), ids), strategy
            assert torch.equal(model(**inputs).logits, logits), strategy
            assert "no adapter of its own" in handle.adapter.facts.family


@pytest.mark.parametrize(("strategy", "keep"), SERVED)
def test_gather_equals_mask(name: str, strategy: str, keep: float) -> None:
    model, inputs, n = built(name)
    with merging() as chosen, vtprune.wrap(model, strategy, keep=keep) as handle:
        ids = new_ids(model, inputs)
        report = handle.report()
    visual = (inputs["input_ids"] == strangers.IMAGE).sum(1).tolist()
    assert [report.of_sample(b)[0] for b in range(2)] == visual == [n, 2 * n]
    if report.stages:
        assert any(stage.kept < stage.tokens for stage in report.stages)
    else:
        assert all(2 * image.kept == image.tokens for image in report.images)
        assert handle.index is not None
        assert handle.index.shape[1] == inputs["input_ids"].shape[1] - n
    wanted, _ = Reference(built(name, "eager")[0], inputs, handle, chosen=chosen).greedy(5)
    assert torch.equal(ids, wanted)


def test_a_direct_call_equals_generate(name: str) -> None:
    model, inputs, _ = built(name)
    with torch.no_grad(), vtprune.wrap(model, "divprune", keep=0.5):
        first = model.generate(
            **inputs, max_new_tokens=1, output_logits=True, return_dict_in_generate=True
        )
        torch.testing.assert_close(model(**inputs).logits[:, -1], first.logits[0])
        if name not in MROPE:  # its own decode loop needs position ids, wrapped or not
            assert torch.equal(decoded(model, inputs), new_ids(model, inputs))


@pytest.mark.parametrize("strategy", ["fastervlm", "visionzip", "vtc_cls"])
def test_signals_of_an_unknown_tower_are_refused(name: str, strategy: str) -> None:
    model, _, _ = built(name)
    with pytest.raises(vtprune.UnsupportedError) as error:
        vtprune.wrap(model, strategy, keep=0.5)
    for part in (strategy, type(model).__name__, "no adapter of its own", "'divprune'"):
        assert part in str(error.value)


def test_three_axes_are_not_renumbered() -> None:
    model, _, _ = built("glm4v")
    with pytest.raises(vtprune.UnsupportedError, match="time, height and width"):
        vtprune.wrap(model, "divprune", keep=0.5, positions="renumber")


def _empty(cls: Any, config: Any) -> Any:
    with torch.device("meta"):
        return cls(config)


def _mllama() -> Any:
    vision = {"num_hidden_layers": 1, "num_global_layers": 1, "intermediate_layers_indices": [0]}
    text = {
        "num_hidden_layers": 1,
        "cross_attention_layers": [],
        "vocab_size": 99,
        "pad_token_id": 0,
    }
    config = hf.MllamaConfig(vision_config=vision, text_config=text)
    return _empty(hf.MllamaForConditionalGeneration, config)


def _q_former(cls: Any, config: Any, **extra: Any) -> Any:
    small: dict[str, Any] = {"num_hidden_layers": 1}
    text = hf.OPTConfig(**small, vocab_size=99)
    return _empty(cls, config(vision_config=small, qformer_config=small, text_config=text, **extra))


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (_mllama, "cross-attention"),
        (lambda: _q_former(hf.Blip2ForConditionalGeneration, hf.Blip2Config), "Q-Former"),
        (
            lambda: _q_former(hf.InstructBlipForConditionalGeneration, hf.InstructBlipConfig),
            "Q-Former",
        ),
    ],
)
def test_models_that_cannot_be_served_are_refused_by_name(build: Any, reason: str) -> None:
    model = build()
    with pytest.raises(vtprune.UnsupportedError) as error:
        vtprune.wrap(model, "divprune", keep=0.5)
    for part in (type(model).__name__, reason, "Use a model"):
        assert part in str(error.value)
