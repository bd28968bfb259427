"""Contrastive decoding on tiny models, held against one that knows no cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor

import vtprune
from tests.contrast.slow import Slow, alone, next_logits, whole
from tests.families.oracles import model_of
from tests.probes import generate
from vtprune import ConfigError, InputError, UnsupportedError
from vtprune.contrast import ContrastiveDecoder, twin
from vtprune.eval import tiny

QUICK = ("llava", "qwen2_5_vl")
DAMRO = {"strategy": "damro", "keep": 4}
VIEWS: dict[str, dict[str, Any]] = {
    "damro": DAMRO,
    "divprune": {"strategy": "divprune", "keep": 5},
    "fastv": {"strategy": "fastv", "keep": 6},
    "shortv": {"strategy": "shortv"},
    "whole": {},
}


def contrast(family: str, view: dict[str, Any], seed: int = 0, **how: Any) -> ContrastiveDecoder:
    return ContrastiveDecoder(model_of(family)[0], whole(family, seed), **view, **how)


class Same(LogitsProcessor):
    """Asserts that the scores that reach it are logits, but for tokens that are barred."""

    def __init__(self, logits: Tensor) -> None:
        self.logits, self.step = logits, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        wanted = self.logits[:, self.step].where(scores > -torch.inf, -torch.inf)
        assert torch.equal(scores, wanted) and bool((scores > -torch.inf).any(1).all())
        self.step += 1
        return scores


def families() -> list[Any]:
    slow = [pytest.param(name, marks=pytest.mark.slow) for name in tiny.names()]
    return [name if name in QUICK else one for name, one in zip(tiny.names(), slow, strict=True)]


@pytest.mark.parametrize("family", families())
def test_without_weight_nothing_changes(family: str) -> None:
    """And the logits of the whole view are those of ``generate``, bit for bit."""
    if family == "smolvlm":
        pytest.importorskip("num2words")
    model, inputs = model_of(family)[0], whole(family)
    ids, logits = generate(model, inputs, 3)
    for view in (DAMRO if family in QUICK else VIEWS["divprune"], VIEWS["fastv"], VIEWS["shortv"]):
        with contrast(family, view, alpha=0.0, beta=0.0) as decoder:
            made = generate(model, inputs, 3, logits_processor=[decoder, Same(logits)])
        assert torch.equal(made[0], ids) and torch.equal(made[1], logits)
    branch = contrast(family, {}, alpha=1.0).branch
    for step in range(3):
        text = torch.cat([inputs["input_ids"], ids[:, :step]], dim=1)
        assert torch.equal(branch.logits(text), logits[:, step])


def both(
    family: str, view: dict[str, Any], main: dict[str, Any] | None = None, **call: Any
) -> tuple[Any, Any]:
    """What the decoder makes, and what it should: sequences and scores."""
    model, inputs = model_of(family)[0], whole(family)
    how = {"alpha": 1.5, "beta": 0.05, "sign": -1} | {
        name: call.pop(name) for name in ("alpha", "beta", "sign") if name in call
    }
    seed = call.pop("seed", 0)
    wrap = view or None

    def run(processor: Any) -> Any:
        torch.manual_seed(0)
        options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, **call}
        return model.generate(
            **inputs,
            **options,
            logits_processor=[processor],
            return_dict_in_generate=True,
            output_scores=True,
        )

    length = inputs["input_ids"].shape[1]
    slow_model = twin(model)  # so that the wrapped main run is none of its business
    slow = Slow(slow_model, length, alone(family, seed), wrap, **how)
    with contrast(family, view, seed, **how) as decoder:
        if main is None:
            return run(decoder), run(slow)
        with vtprune.wrap(model, **main):
            return run(decoder), run(slow)


def assert_same(made: Any, wanted: Any) -> None:
    assert torch.equal(made.sequences, wanted.sequences)
    for one, other in zip(made.scores, wanted.scores, strict=True):
        assert torch.equal(one.isinf(), other.isinf())
        assert (one - other)[~one.isinf()].abs().max() < 2e-4


@pytest.mark.parametrize("family", QUICK)
@pytest.mark.parametrize("view", ["damro", pytest.param("divprune", marks=pytest.mark.slow)])
def test_equals_two_runs_without_caches(family: str, view: str) -> None:
    made, wanted = both(family, VIEWS[view])
    assert_same(made, wanted)
    plain = generate(model_of(family)[0], whole(family), 3)[0]
    assert not torch.equal(made.sequences[:, -3:], plain), "the view says something else"


@pytest.mark.parametrize("family", QUICK)
def test_with_another_image_added(family: str) -> None:
    assert_same(*both(family, {}, seed=11, alpha=2.0, beta=0.1, sign=1))


@pytest.mark.parametrize("family", ["llava", pytest.param("qwen2_5_vl", marks=pytest.mark.slow)])
def test_beams(family: str) -> None:
    assert_same(*both(family, DAMRO, num_beams=2))


@pytest.mark.slow
@pytest.mark.parametrize("family", QUICK)
def test_beams_with_another_image(family: str) -> None:
    assert_same(*both(family, {}, seed=11, num_beams=3, sign=1))


@pytest.mark.slow
@pytest.mark.parametrize("family", QUICK)
def test_samples(family: str) -> None:
    how = {"do_sample": True, "temperature": 1.0, "num_return_sequences": 2}
    assert_same(*both(family, DAMRO, **how))


@pytest.mark.parametrize("family", ["llava", pytest.param("qwen2_5_vl", marks=pytest.mark.slow)])
@pytest.mark.parametrize("main", ["divprune", "fastv"])
def test_beside_a_wrapped_run(family: str, main: str) -> None:
    assert_same(*both(family, {}, VIEWS[main], sign=1, seed=11))


@pytest.mark.slow
@pytest.mark.parametrize("family", QUICK)
@pytest.mark.parametrize("main", ["divprune", "fastv", "shortv"])
def test_a_pruned_view_beside_a_wrapped_run(family: str, main: str) -> None:
    assert_same(*both(family, DAMRO, VIEWS[main]))


@pytest.mark.parametrize("family", ["llava"])
def test_the_report_of_the_run_is_its_own(family: str) -> None:
    model, inputs = model_of(family)[0], whole(family)
    with vtprune.wrap(model, "divprune", keep=7) as handle:
        generate(model, inputs, 3)
        wanted = [selection.rows for selection in handle.selections]
        with contrast(family, DAMRO, alpha=1.0) as decoder:
            generate(model, inputs, 3, logits_processor=[decoder])
            assert decoder.handle is not None
            assert {s.rows.shape[1] for s in decoder.handle.selections} == {4}
        made = [selection.rows for selection in handle.selections]
    assert all(torch.equal(a, b) for a, b in zip(made, wanted, strict=True))


@pytest.mark.parametrize("family", ["qwen2_5_vl", pytest.param("llava", marks=pytest.mark.slow)])
def test_a_view_inside_the_language_model(family: str) -> None:
    """The view decodes what a wrapped model decodes that is given the same tokens."""
    model, inputs = model_of(family)[0], whole(family)
    ids, _ = generate(model, inputs, 4)
    with contrast(family, VIEWS["fastv"], alpha=1.0) as decoder:
        made = [
            decoder.branch.logits(torch.cat([inputs["input_ids"], ids[:, :step]], dim=1))
            for step in range(4)
        ]
    with torch.no_grad(), vtprune.wrap(model, **VIEWS["fastv"]):
        mask = inputs["attention_mask"]
        out = model(**inputs, use_cache=True)
        for step in range(4):
            assert (out.logits[:, -1] - made[step]).abs().max() < 1e-4
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            given = {"past_key_values": out.past_key_values, "attention_mask": mask}
            out = model(input_ids=ids[:, step : step + 1], **given)


def test_begins_anew_with_every_call() -> None:
    model, inputs = model_of("llava")[0], whole("llava")
    with contrast("llava", DAMRO, alpha=1.0) as decoder:
        first = generate(model, inputs, 3, logits_processor=[decoder])
        again = generate(model, inputs, 3, logits_processor=[decoder])
    assert torch.equal(first[0], again[0])


def test_a_prompt_without_a_mask() -> None:
    model = model_of("llava")[0]
    inputs = whole("llava")
    padding = model.generation_config.pad_token_id
    bare = {k: v for k, v in inputs.items() if k != "attention_mask"}
    assert torch.equal(inputs["input_ids"] != padding, inputs["attention_mask"].bool())
    with ContrastiveDecoder(model, bare, **DAMRO, alpha=1.0) as decoder:
        made = generate(model, bare, 3, logits_processor=[decoder])
    with ContrastiveDecoder(model, inputs, **DAMRO, alpha=1.0) as decoder:
        wanted = generate(model, inputs, 3, logits_processor=[decoder])
    assert torch.equal(made[0], wanted[0])


def test_leaves_nothing_behind() -> None:
    model = model_of("llava")[0]
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    hooks = {n: len(m._forward_pre_hooks) + len(m._forward_hooks) for n, m in model.named_modules()}
    with contrast("llava", VIEWS["fastv"], alpha=1.0) as decoder:
        generate(model, whole("llava"), 2, logits_processor=[decoder])
        assert "forward" not in vars(model)
    after = {n: len(m._forward_pre_hooks) + len(m._forward_hooks) for n, m in model.named_modules()}
    assert hooks == after
    assert before == {name: set(vars(module)) for name, module in model.named_modules()}


def test_the_position_offset_of_the_run_is_its_own() -> None:
    model, inputs = model_of("qwen2_5_vl")[0], whole("qwen2_5_vl")
    generate(model, inputs, 2)
    offset = model.model.rope_deltas.clone()
    other = contrast("qwen2_5_vl", {}, alpha=1.0)
    other.branch.model.model.rope_deltas = offset + 5
    assert torch.equal(model.model.rope_deltas, offset)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"alpha": -1.0}, "alpha=-1.0 must be a number, at least 0"),
        ({"alpha": float("nan")}, "alpha=nan"),
        ({"alpha": True}, "alpha=True"),
        ({"alpha": 1.0, "beta": 1.5}, "beta=1.5 must be a number, from 0 to 1"),
        ({"alpha": 1.0, "sign": 2}, "sign=2 must be -1"),
        ({"alpha": 1.0, "keep": 4}, "keep: the view has no strategy"),
    ],
)
def test_refuses_values(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        contrast("llava", {}, **wrong)


def test_refuses_texts_that_do_not_go_on() -> None:
    model, inputs = model_of("llava")[0], whole("llava")
    ids = inputs["input_ids"]
    branch = contrast("llava", {}, alpha=1.0).branch
    with pytest.raises(InputError, match="no input_ids"):
        ContrastiveDecoder(model, {}, alpha=1.0)
    with pytest.raises(InputError, match="does not go on"):
        branch.logits(ids.flip(0))
    with pytest.raises(InputError, match="cannot go on"):
        branch.logits(ids[:, :-1])
    with pytest.raises(InputError, match="cannot go on"):
        branch.logits(ids[:1])
    more = torch.cat([ids, ids[:, -1:]], dim=1)
    branch.logits(more)
    with pytest.raises(InputError, match="does not go on"):
        branch.logits(torch.cat([ids, ids[:, -2:-1], ids[:, -1:]], dim=1))


def test_refuses_beams_of_a_view_inside() -> None:
    model, inputs = model_of("llava")[0], whole("llava")
    with (
        contrast("llava", VIEWS["fastv"], alpha=1.0) as decoder,
        pytest.raises(UnsupportedError, match="inside the language model"),
    ):
        generate(model, inputs, 2, logits_processor=[decoder], num_beams=2)


def test_next_logits_of_the_reference_see_the_text() -> None:
    model, (single, _) = model_of("llava")[0], alone("llava")
    one = next_logits(model, single, torch.tensor([5]))
    assert not torch.equal(one, next_logits(model, single, torch.tensor([6])))
