"""Stages inside the language model: ways of calling a model, what is refused, what is left."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

import vtprune
from tests import tiny
from tests.engine.test_generation import OLD, one_image_each
from tests.engine.test_inside import MEAN, NAMES
from tests.engine.test_inside_merging import Merging
from tests.probes import generate
from vtprune import ConfigError, UnsupportedError
from vtprune.types import ClsRow, Facts, Site, Stage


@pytest.mark.parametrize("policy", ["keep", "renumber"])
@pytest.mark.parametrize("name", NAMES)
def test_a_decode_loop_by_hand(name, policy):
    model = tiny.build()
    for inputs in (tiny.one_image(), tiny.ragged()):
        with vtprune.wrap(model, name, keep=MEAN[name], positions=policy):
            wanted, _ = generate(model, inputs, n=5)
            out = model(**inputs)
            mask, ids = inputs["attention_mask"], []
            for _ in range(5):
                scores = out.logits[:, -1].index_fill(1, torch.tensor([tiny.IMAGE]), -1e30)
                ids.append(scores.argmax(-1))
                mask = torch.cat([mask, torch.ones(len(mask), 1, dtype=torch.long)], dim=1)
                out = model(
                    input_ids=ids[-1][:, None],
                    attention_mask=mask,
                    past_key_values=out.past_key_values,
                )
        assert torch.equal(torch.stack(ids, 1), wanted)


@pytest.mark.parametrize("name", NAMES)
def test_beams_and_several_sequences(name):
    model, inputs = tiny.build(), one_image_each() if OLD else tiny.ragged()
    first = {
        "input_ids": inputs["input_ids"][1:],
        "attention_mask": inputs["attention_mask"][1:],
        "pixel_values": inputs["pixel_values"][1:],
    }
    options = {"max_new_tokens": 6, "num_return_sequences": 2}
    with vtprune.wrap(model, name, keep=MEAN[name]) as handle:
        greedy = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        assert handle.final is not None
        columns = handle.final.clone()
        left = [s.kept for s in handle.report().stages if s.layer == handle.steps[-1].stage.layer]
        visual = (inputs["input_ids"] == tiny.IMAGE).sum(1)
        dropped = inputs["attention_mask"].sum(1) - (columns >= 0).sum(1)
        assert (visual - dropped).tolist() == left
        twice = model.generate(**inputs, **options, do_sample=True, top_k=1)
        assert torch.equal(twice, greedy.repeat_interleave(2, dim=0))
        beams = model.generate(**inputs, **options, do_sample=False, num_beams=3)
        assert torch.equal(handle.final, columns)
        assert {stage.sample for stage in handle.report().stages} == {0, 1}
        alone = model.generate(**first, **options, do_sample=False, num_beams=3)
    assert torch.equal(beams[2:], alone)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_half_precision(name, dtype):
    model, inputs = tiny.build().to(dtype), tiny.ragged()
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    with vtprune.wrap(model, name, keep=MEAN[name]) as handle:
        logits = model(**inputs).logits
        assert logits.dtype == dtype
        assert handle.index is not None
        assert logits[handle.index >= 0].isfinite().all()


def test_text_alone_is_left_alone():
    model = tiny.build()
    inputs = tiny.batch(tiny.prompt(4, 6, 0, seed=1))
    del inputs["pixel_values"]
    wanted = generate(model, inputs)[0]
    with vtprune.wrap(model, "fastv", keep=4) as handle:
        assert torch.equal(generate(model, inputs)[0], wanted)
        assert handle.report().stages == ()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"use_cache": False}, "use_cache=False"),
        ({"prefill_chunk_size": 8}, "prefill_chunk_size"),
        ({"prompt_lookup_num_tokens": 2}, "prompt_lookup_num_tokens"),
    ],
)
def test_ways_of_generating_that_choose_anew_are_refused(options, named):
    model, inputs = tiny.build(), tiny.one_image()
    with vtprune.wrap(model, "fastv", keep=4), pytest.raises(UnsupportedError, match=named):
        model.generate(**inputs, max_new_tokens=2, **options)


def test_labels_are_refused():
    model, inputs = tiny.build(), tiny.one_image()
    with vtprune.wrap(model, "fastv", keep=4), pytest.raises(UnsupportedError, match="labels"):
        model(**inputs, labels=inputs["input_ids"])


def test_orders_and_budgets_that_cannot_be():
    model = tiny.build()
    with pytest.raises(ConfigError, match="in the order in which they act"):
        vtprune.wrap(model, ["fastv", "divprune"], keep=[9, 4])
    with pytest.raises(ConfigError, match="in the order in which they act"):
        vtprune.wrap(model, ["pyramiddrop", "fastv"], keep=[0.5, 4])
    with pytest.raises(ConfigError, match="out of reach of pyramiddrop"):
        vtprune.wrap(model, "pyramiddrop", keep=0.25)
    with pytest.raises(ConfigError, match=r"decoder layers 1 to 3"):
        vtprune.wrap(model, "fastv", keep=4, layers=(0,))


def test_needs_of_other_parts_are_refused_inside():
    @dataclass(frozen=True)
    class Reads(Merging):
        def plan(self, facts: Facts) -> tuple[Stage, ...]:
            return (Stage(Site.DECODER, (ClsRow(1),), 2),)

    with pytest.raises(UnsupportedError, match="only quantities of the language model"):
        vtprune.wrap(tiny.build(), Reads(), keep=4)


def test_the_mean_over_layers_is_what_was_asked():
    model, inputs = tiny.build(), tiny.one_image()
    with vtprune.wrap(model, "pyramiddrop", keep=0.5) as handle:
        generate(model, inputs, n=1)
        report = handle.report()
    kept = [tiny.N, *(stage.kept for stage in report.stages)]
    assert report.of_sample(0) == (tiny.N, sum(kept) / 4)
    assert abs(sum(kept) / 4 - tiny.N / 2) <= 1


@pytest.mark.parametrize("name", NAMES)
def test_removal_leaves_nothing(name):
    model, inputs = tiny.build(), tiny.one_image()
    wanted = generate(model, inputs)[1]

    def hooks():
        return [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]

    before = hooks()
    with vtprune.wrap(model, name, keep=MEAN[name]):
        generate(model, inputs)
    assert hooks() == before
    assert torch.equal(generate(model, inputs)[1], wanted)
