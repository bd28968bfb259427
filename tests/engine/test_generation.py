"""Everything that generate and forward offer, with a shortened prompt under it."""

from __future__ import annotations

import pytest
import torch
from packaging.version import Version
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

import vtprune
from tests import tiny
from tests.contracts.bank import ELSEWHERE
from vtprune.engine import generation
from vtprune.engine.generation import shift_lengths
from vtprune.registry import keeping_names, strategy_class

NAMES = [
    name
    for name in keeping_names()
    if not strategy_class(name).acts_inside and name not in ELSEWHERE
]


@pytest.fixture
def model():
    return tiny.build()


def row(inputs, b):
    """One row of the ragged batch, without its padding and with its own images."""
    valid = inputs["attention_mask"][b].bool()
    images = slice(0, 1) if b == 0 else slice(1, None)
    return {
        "input_ids": inputs["input_ids"][b, valid][None],
        "attention_mask": torch.ones(1, int(valid.sum()), dtype=torch.long),
        "pixel_values": inputs["pixel_values"][images],
    }


@pytest.mark.parametrize("policy", ["keep", "renumber"])
@pytest.mark.parametrize("name", ["fastervlm", "visionzip"])
def test_beams_and_rows_alone(model, name, policy):
    inputs = one_image_each() if OLD else tiny.ragged()
    with vtprune.wrap(model, name, keep=9, positions=policy):
        together = model.generate(**inputs, max_new_tokens=6, num_beams=3)
        for b in range(2):
            alone = model.generate(**row(inputs, b), max_new_tokens=6, num_beams=3)
            assert torch.equal(alone[0, -6:], together[b, -6:])


OLD = Version(generation.TRANSFORMERS) < Version("5.19")


def one_image_each():
    return tiny.batch(tiny.prompt(2, 6, 1, seed=2), tiny.prompt(4, 3, 1, seed=3))


def test_old_transformers_mixes_up_images_and_is_refused(model, monkeypatch):
    monkeypatch.setattr(generation, "TRANSFORMERS", "5.18.0")
    with vtprune.wrap(model, "divprune", keep=9):
        for several in ({"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}):
            with pytest.raises(vtprune.UnsupportedError, match="mixes up the images"):
                model.generate(**tiny.ragged(), max_new_tokens=1, **several)
            model.generate(**one_image_each(), max_new_tokens=1, **several)
        model.generate(**tiny.ragged(), max_new_tokens=1)


@pytest.mark.parametrize("batch", [one_image_each, *([] if OLD else [tiny.ragged])])
def test_several_sequences_per_prompt(model, batch):
    inputs = batch()
    with vtprune.wrap(model, "divprune", keep=9):
        greedy = model.generate(**inputs, max_new_tokens=6)
        twice = model.generate(
            **inputs, max_new_tokens=6, do_sample=True, top_k=1, num_return_sequences=2
        )
    assert torch.equal(twice, greedy.repeat_interleave(2, 0))


def test_output_starts_with_the_callers_prompt(model):
    inputs = tiny.ragged()
    ids = inputs["input_ids"]
    with vtprune.wrap(model, "fastervlm", keep=4):
        plain = model.generate(**inputs, max_new_tokens=3)
        full = model.generate(**inputs, max_new_tokens=3, return_dict_in_generate=True)
        positional = model.generate(
            ids, pixel_values=inputs["pixel_values"], attention_mask=inputs["attention_mask"],
            max_new_tokens=3,
        )  # fmt: skip
    assert plain.shape == (2, ids.shape[1] + 3)
    for out in (plain, full.sequences, positional):
        assert torch.equal(out, plain)
        assert torch.equal(out[:, : ids.shape[1]], ids)


def test_lengths_count_the_callers_prompt(model):
    inputs = tiny.one_image()
    length = inputs["input_ids"].shape[1]
    config = GenerationConfig(max_length=length + 4, pad_token_id=0, suppress_tokens=[tiny.IMAGE])
    with vtprune.wrap(model, "fastervlm", keep=4):
        assert model.generate(**inputs, max_length=length + 4).shape[1] == length + 4
        assert model.generate(**inputs, generation_config=config).shape[1] == length + 4
    assert config.max_length == length + 4
    kwargs = {"min_length": 10, "max_new_tokens": 5, "max_length": 30}
    shift_lengths(kwargs, None, 8)
    assert kwargs == {"min_length": 2, "max_new_tokens": 5, "max_length": 30}


def test_callbacks_see_the_callers_prompt(model):
    inputs, seen = tiny.ragged(), []

    def processor(input_ids, scores):
        seen.append(input_ids)
        return scores

    def stop(input_ids, scores, **kwargs):
        seen.append(input_ids)
        return torch.zeros(len(input_ids), dtype=torch.bool)

    def allowed(batch_id, sent):
        seen.append(sent[None].expand(2, -1).where(torch.arange(2)[:, None] == batch_id, -1))
        return list(range(3, 80))

    with vtprune.wrap(model, "fastervlm", keep=4):
        model.generate(
            **inputs,
            max_new_tokens=2,
            logits_processor=LogitsProcessorList([processor]),
            stopping_criteria=StoppingCriteriaList([stop]),
            prefix_allowed_tokens_fn=allowed,
        )
    assert len(seen) == 8
    for ids in seen:
        prompt = ids[:, : inputs["input_ids"].shape[1]]
        assert ((prompt == inputs["input_ids"]) | (prompt == -1)).all()


def test_streamer_gets_the_callers_prompt(model):
    class Collect:
        def __init__(self):
            self.got = []

        def put(self, value):
            self.got.append(value)

        def end(self):
            self.got.append("end")

    streamer, inputs = Collect(), tiny.one_image()
    with vtprune.wrap(model, "fastervlm", keep=4):
        out = model.generate(**inputs, max_new_tokens=3, streamer=streamer)
    assert torch.equal(streamer.got[0], inputs["input_ids"])
    assert torch.cat([v.flatten() for v in streamer.got[1:4]]).tolist() == out[0, -3:].tolist()
    assert streamer.got[-1] == "end"


@pytest.mark.parametrize("policy", ["keep", "renumber"])
def test_assisted_decoding_changes_nothing(model, policy):
    inputs = tiny.one_image()
    with vtprune.wrap(model, "fastervlm", keep=9, positions=policy):
        plain = model.generate(**inputs, max_new_tokens=8)
        lookup = model.generate(**inputs, max_new_tokens=8, prompt_lookup_num_tokens=3)
    assert torch.equal(plain, lookup)


def test_prompts_without_images(model):
    text = {k: v for k, v in tiny.batch(tiny.prompt(3, 5, 0, seed=1)).items() if k[0] != "p"}
    plain = model.generate(**text, max_new_tokens=5)
    with vtprune.wrap(model, "fastervlm", keep=4):
        assert torch.equal(model.generate(**text, max_new_tokens=5), plain)
    mixed = tiny.batch(tiny.prompt(3, 5, 0, seed=1), tiny.prompt(3, 5, 1, seed=2))
    with vtprune.wrap(model, "fastervlm", keep=4) as handle:
        out = model.generate(**mixed, max_new_tokens=5)
        assert [image.sample for image in handle.report().images] == [1]
    assert torch.equal(out[0, -5:], plain[0, -5:])


@pytest.mark.parametrize("policy", ["keep", "renumber"])
def test_the_longest_row_may_have_no_image(model, policy):
    long = tiny.prompt(40, 30, 0, seed=1)
    mixed = tiny.batch(long, tiny.prompt(3, 5, 1, seed=2))
    alone = tiny.batch(tiny.prompt(3, 5, 1, seed=2))
    with torch.no_grad(), vtprune.wrap(model, "fastervlm", keep=9, positions=policy):
        both = model.generate(**mixed, max_new_tokens=5)
        assert torch.equal(both[1, -5:], model.generate(**alone, max_new_tokens=5)[0, -5:])
        mask, out, tokens = mixed["attention_mask"], model(**mixed, use_cache=True), []
        for _ in range(5):
            out.logits[:, -1, tiny.IMAGE] = -float("inf")
            tokens.append(out.logits[:, -1].argmax(-1))
            mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
            out = model(
                input_ids=tokens[-1][:, None],
                past_key_values=out.past_key_values,
                attention_mask=mask,
            )
    assert torch.equal(torch.stack(tokens, 1), both[:, -5:])


def test_the_report_is_of_the_last_call(model):
    text = {k: v for k, v in tiny.batch(tiny.prompt(3, 5, 0, seed=1)).items() if k[0] != "p"}
    with vtprune.wrap(model, "fastervlm", keep=4) as handle:
        handle.timing = True
        model.generate(**tiny.one_image(), max_new_tokens=1)
        assert len(handle.report().images) == len(handle.selections) == 1
        model.generate(**text, max_new_tokens=1)
        assert handle.report().images == () and not handle.report().ms


def test_direct_call_gives_the_logits_of_the_short_prompt(model):
    inputs = tiny.ragged()
    ids = inputs["input_ids"]
    labels = ids.masked_fill(inputs["attention_mask"] == 0, -100)
    with vtprune.wrap(model, "fastervlm", keep=9) as handle:
        out = model(**inputs, labels=labels)
        index = handle.index
    assert index is not None
    assert out.logits.shape[:2] == index.shape
    short_labels = labels.gather(1, index.clamp(min=0)).masked_fill(index < 0, -100)
    wanted = torch.nn.functional.cross_entropy(
        out.logits[:, :-1].flatten(0, 1), short_labels[:, 1:].flatten()
    )
    torch.testing.assert_close(out.loss, wanted)
    out.loss.backward()
    assert model.model.vision_tower.encoder.layers[0].mlp.fc1.weight.grad.abs().sum() > 0


def test_right_padding_stays_right(model):
    inputs = tiny.ragged()
    valid = inputs["attention_mask"].bool()
    right = {**inputs}
    for name in ("input_ids", "attention_mask"):
        right[name] = torch.stack(
            [torch.cat([x[v], x[~v]]) for x, v in zip(inputs[name], valid, strict=True)]
        )
    with vtprune.wrap(model, "fastervlm", keep=9) as handle:
        left_logits, left = model(**inputs).logits, handle.index
        right_logits, index = model(**right).logits, handle.index
    assert left is not None and index is not None
    assert (index[:, 0] >= 0).all() and (index[0, -1] < 0)
    for b in range(2):
        a, c = left_logits[b, left[b] >= 0], right_logits[b, index[b] >= 0]
        torch.testing.assert_close(a, c, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("policy", ["keep", "renumber"])
@pytest.mark.parametrize("shape", ["one", "ragged"])
@pytest.mark.parametrize("explicit", [True, False])
def test_manual_decoding_equals_generate(model, shape, policy, explicit):
    inputs = tiny.one_image() if shape == "one" else tiny.ragged()
    mask = inputs["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad(), vtprune.wrap(model, "fastervlm", keep=9, positions=policy):
        wanted = model.generate(**inputs, max_new_tokens=5)[:, -5:]
        given = {"position_ids": positions} if explicit else {}
        out = model(**inputs, **given, use_cache=True)
        tokens = []
        for step in range(5):
            logits = out.logits[:, -1]
            logits[:, tiny.IMAGE] = -float("inf")
            tokens.append(logits.argmax(-1))
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            positions = positions[:, -1:] + 1
            given = {"position_ids": positions} if explicit else {}
            out = model(
                input_ids=tokens[-1][:, None],
                past_key_values=out.past_key_values,
                attention_mask=None if step == 3 else mask,
                **given,
            )
    assert torch.equal(torch.stack(tokens, 1), wanted)


def test_a_mask_of_the_wrong_length_is_refused(model):
    inputs = tiny.one_image()
    with torch.no_grad(), vtprune.wrap(model, "fastervlm", keep=9):
        out = model(**inputs, use_cache=True)
        with pytest.raises(vtprune.InputError, match="decoded tokens"):
            model(
                input_ids=torch.tensor([[5]]),
                past_key_values=out.past_key_values,
                attention_mask=torch.ones(1, 7),
            )


def test_padding_without_a_mask_is_inferred_as_generate_does(model):
    inputs = tiny.ragged()
    without = {k: v for k, v in inputs.items() if k != "attention_mask"}
    plain = model.generate(**without, max_new_tokens=5)
    assert torch.equal(plain, model.generate(**inputs, max_new_tokens=5))
    with vtprune.wrap(model, "fastervlm", keep=9):
        wanted = model.generate(**inputs, max_new_tokens=5)
        assert torch.equal(model.generate(**without, max_new_tokens=5), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_half_precision(name, dtype):
    model, inputs = tiny.build().to(dtype), tiny.ragged()
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    with vtprune.wrap(model, name, keep=9, processor=tiny.Processor()) as handle:
        logits = model(**inputs).logits
        assert logits.dtype == dtype
        assert handle.index is not None
        assert logits[handle.index >= 0].isfinite().all()
        report = handle.report()
        kept = [report.of_sample(row)[1] for row in (0, 1)]  # one image, two images
        if strategy_class(name).kind == "adaptive" and not report.stages:
            assert all(8 * n <= k <= 9 * n for n, k in zip((1, 2), kept, strict=True))
            return
        assert kept == pytest.approx([9, 18], abs=0.5 if report.stages else 0)
