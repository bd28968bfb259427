"""FlowCut in the tower and in the language model: counts per sample, newlines, ways of calling."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vtprune
from tests.families import prompts
from tests.families.batches import batch, converted, decoded, new_ids, of
from tests.families.oracles import gather_is_mask, inputs_of, keeps_all, model_of
from vtprune.engine import decoding
from vtprune.engine.plan import find_adapter
from vtprune.eval import tiny
from vtprune.registry import build
from vtprune.types import Budget, Site

# Where every image or tile has as many tokens; elsewhere their number depends on the image.
OTHERS = ["gemma3", "idefics3", "internvl", "llava", "llava_siglip", "paligemma", "smolvlm"]
SIZES = [family for family in tiny.names() if family not in OTHERS]
CASES = [(family, kind) for family in SIZES for kind in prompts.kinds(family) if kind != "mixed"]
INSIDE = build("flowcut", inside=True)


def check_counts(family: str, kind: str, keep: int | float, strategy: Any = "flowcut") -> None:
    """Holds what is left of each image, and then of each sample, against the budget."""
    model, inputs, budget = model_of(family)[0], inputs_of(family, kind), Budget.of(keep)
    with torch.no_grad(), vtprune.wrap(model, strategy, keep=keep) as handle:
        model(**inputs)
        report, items = handle.report(), handle._items
    left, fixed = [0] * len(inputs["input_ids"]), [0] * len(inputs["input_ids"])
    for image, item in zip(report.images, items, strict=True):
        count = len(item.free)
        assert image.kept - image.fixed >= min(count, 2 * budget.count(count) - 1)
        if budget.tokens is not None:
            assert image.kept - image.fixed == min(count, 2 * budget.tokens)
            assert image.short == (count < budget.tokens)
        left[image.sample] += budget.count(count)
        fixed[image.sample] += image.fixed
    for stage in report.stages:
        assert stage.kept - fixed[stage.sample] == left[stage.sample]
    assert [stage.sample for stage in report.stages] == [i for i, n in enumerate(left) if n]


def test_which_families_have_images_of_any_size(family, built) -> None:
    assert (find_adapter(built[0]).facts.n_tokens is None) == (family in SIZES)


@pytest.mark.parametrize("keep", [0.3, 0.7, 5, 11, 500])
@pytest.mark.parametrize(("family", "kind"), CASES)
def test_the_tower_leaves_twice_the_budget_and_the_language_model_the_budget(family, kind, keep):
    check_counts(family, kind, keep)


def test_two_images_of_different_sizes_count_by_themselves() -> None:
    check_counts("qwen2_vl", "ragged", 13)  # of 12, 21 and 24: one is short of its own
    with pytest.raises(AssertionError):
        check_counts("qwen2_vl", "ragged", 5, build("flowcut", inside=False))


def test_newlines_taken_for_patches_are_noticed(monkeypatch) -> None:
    right = decoding.of_patches
    monkeypatch.setattr(
        decoding,
        "of_patches",
        lambda ids, items: right(ids, items) | (ids == items[0].modality.placeholder),
    )
    with pytest.raises(AssertionError):
        check_counts("llava_next", "ragged", 5)


@pytest.mark.parametrize("family", ["llava_next", "llava_next_video", "llava_onevision"])
def test_newlines_stay(family) -> None:
    model, inputs = model_of(family)[0], inputs_of(family, "one")
    with torch.no_grad(), vtprune.wrap(model, "flowcut", keep=5) as handle:
        model(**inputs)
        (item,), final = handle._items, handle.final
    assert final is not None
    places = (inputs["input_ids"][0] == item.modality.placeholder).nonzero()[:, 0]
    assert len(item.fixed)
    assert torch.isin(places[item.fixed], final[0]).all()
    assert int(torch.isin(places[item.free], final[0]).sum()) == 5


@pytest.mark.parametrize("family", OTHERS)
def test_elsewhere_only_the_tower_is_cut_unless_asked_for(family) -> None:
    model = model_of(family)[0]
    with vtprune.wrap(model, "flowcut", keep=4) as handle:
        assert not handle.inside
    keeps_all(family, "ragged", INSIDE)
    wrap = {"strategy": INSIDE, "keep": 0.3}
    handle = gather_is_mask(family, inputs_of(family, "ragged"), wrap)
    assert all(stage.kept < stage.tokens for stage in handle.report().stages)
    check_counts(family, "one", 4, INSIDE)


@pytest.mark.parametrize("family", SIZES)
def test_the_tower_alone_leaves_the_budget(family) -> None:
    wrap = {"strategy": "flowcut", "keep": 5, "inside": False}
    handle = gather_is_mask(family, inputs_of(family, "ragged"), wrap)
    assert not handle.inside
    assert {image.kept - image.fixed for image in handle.report().images} == {5}


@pytest.mark.parametrize("family", SIZES)
def test_a_stage_after_it(family) -> None:
    """The later one counts and reads what the first has left."""
    facts = find_adapter(model_of(family)[0]).facts
    later = build("fastv", layers=(facts.decoder_layers - 1,))
    wrap = {"strategy": ["flowcut", later], "keep": [0.4, 0.5]}
    wrap["positions"] = "keep" if facts.mrope else "renumber"
    handle = gather_is_mask(family, inputs_of(family, "ragged"), wrap)
    stages = handle.report().stages
    assert [s.kept for s in stages[:2]] == [s.tokens for s in stages[2:]]
    assert all(stage.kept < stage.tokens for stage in stages)


@pytest.mark.parametrize("family", SIZES)
def test_rows_alone_beams_and_a_loop_by_hand(family) -> None:
    model, processor = model_of(family)
    first = prompts.user(prompts.image(0, 60, 84), "Which colour has the large ball?")
    second = prompts.user(prompts.image(1, 100, 36), "and", prompts.image(2, 44, 52), "Describe.")
    with vtprune.wrap(model, "flowcut", keep=6) as handle:
        both = new_ids(model, of(processor, first, second))
        left = [stage.kept for stage in handle.report().stages]
        alone = [new_ids(model, of(processor, one)) for one in (first, second)]
        assert torch.equal(both, torch.cat(alone))
        assert handle.report().stages[0].kept == left[1]
        assert torch.equal(decoded(model, of(processor, first, second)), both)
        beams = new_ids(model, of(processor, first), num_beams=2, num_return_sequences=2)
        assert len(beams) == 2
        assert handle.report().stages[0].kept == left[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl"])
def test_half_precision(family, dtype) -> None:
    model, processor = tiny.build(family)
    model.to(dtype)
    inputs = converted(batch(processor, "ragged"), dtype)
    with torch.no_grad(), vtprune.wrap(model, "flowcut", keep=6) as handle:
        logits = model(**inputs).logits
        assert handle.index is not None
        assert logits[handle.index >= 0].isfinite().all()
        assert [stage.kept < stage.tokens for stage in handle.report().stages] == [True, True]


def test_after_another_strategy_it_would_miscount() -> None:
    model = model_of("qwen2_vl")[0]
    with pytest.raises(vtprune.UnsupportedError, match=r"whole images .* first in the list"):
        vtprune.wrap(model, ["divprune", "flowcut"], keep=[0.5, 0.5])
    second = build("flowcut", inside=False)
    with vtprune.wrap(model, ["divprune", second], keep=[0.5, 0.5]) as handle:
        assert {step.stage.site for step in handle.steps} == {Site.PROJECTOR}


def test_it_is_named_once_in_the_report() -> None:
    model, inputs = model_of("llava_next")[0], inputs_of("llava_next", "one")
    with torch.no_grad(), vtprune.wrap(model, "flowcut", keep=5) as handle:
        model(**inputs)
        assert handle.report().strategy == repr(build("flowcut"))
