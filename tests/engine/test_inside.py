"""Stages inside the language model: keep all is bit-identical; leaving equals being hidden."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import vtprune
from tests import tiny
from tests.engine.test_generation import OLD, one_image_each
from vtprune import ConfigError, UnsupportedError
from vtprune.registry import build, strategy_class, strategy_names
from vtprune.types import (
    ClsRow,
    Facts,
    LastRow,
    Mix,
    Positions,
    Selection,
    Signals,
    Site,
    Stage,
    Strategy,
)

BATCHES = {"one": tiny.one_image, "ragged": tiny.ragged}
NAMES = [name for name in strategy_names() if strategy_class(name).acts_inside]
MEAN = {"fastv": 9, "pyramiddrop": 0.5}


def generate(model, inputs, n: int = 10, **options):
    out = model.generate(
        **inputs,
        max_new_tokens=n,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    return out.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(out.logits, 1)


@torch.no_grad()
def reference(model, inputs, decoding, policy, steps=10):
    """The full-length model, layer by layer, no cache: each layer sees what its cut has left.

    Position ids count what each layer sees, or are the original ones.
    """
    text = model.model.language_model
    embed = model.get_input_embeddings()
    embeds = embed(inputs["input_ids"]).clone()
    features = torch.cat(model.model.get_image_features(inputs["pixel_values"]).pooler_output)
    embeds[inputs["input_ids"] == tiny.IMAGE] = features
    valid = inputs["attention_mask"].bool()
    ids, logits = [], []
    for _ in range(steps):
        hidden, added = embeds, embeds.shape[1] - valid.shape[1]
        every = torch.cat([valid, torch.ones(len(valid), added, dtype=torch.bool)], dim=1)
        for number, layer in enumerate(text.layers):
            cut = decoding.cut(number)
            seen = every.clone()
            if cut is not None:
                seen[:, : valid.shape[1]] = False
                for b, columns in enumerate(cut.index):
                    seen[b, columns[columns >= 0]] = True
            counted = seen if policy == "renumber" else every
            positions = (counted.long().cumsum(1) - 1).clamp(min=0)
            n = seen.shape[1]
            mask = seen[:, None, :].expand(-1, n, -1).tril() | torch.eye(n, dtype=torch.bool)
            hidden = layer(
                hidden,
                attention_mask=torch.zeros(mask.shape).masked_fill(~mask, -1e30)[:, None],
                position_embeddings=text.rotary_emb(hidden, positions),
            )
        out = model.lm_head(text.norm(hidden)[:, -1])
        logits.append(out)
        ids.append(out.index_fill(1, torch.tensor([tiny.IMAGE]), -float("inf")).argmax(-1))
        embeds = torch.cat([embeds, embed(ids[-1])[:, None]], dim=1)
    return torch.stack(ids, 1), torch.stack(logits, 1)


def assert_hides_only(model, inputs, strategy, policy, keep, **options):
    with vtprune.wrap(model, strategy, keep=keep, positions=policy) as handle:
        ids, logits = generate(model, inputs, **options)
        decoding, report = handle._decoding, handle.report()
    assert decoding is not None
    assert report.stages
    assert all(stage.kept < stage.tokens for stage in report.stages)
    wanted_ids, wanted = reference(model, inputs, decoding, policy)
    assert torch.equal(ids, wanted_ids)
    assert (logits - wanted).abs().max() < 1e-4
    return report


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("shape", BATCHES)
@pytest.mark.parametrize("name", NAMES)
def test_keep_all_is_bit_identical(name, shape, attention):
    model, inputs = tiny.build(attention=attention), BATCHES[shape]()
    ids, logits = generate(model, inputs)
    plain = model(**inputs).logits
    for policy in ("keep", "renumber"):
        with vtprune.wrap(model, name, keep=1.0, positions=policy) as handle:
            kept_ids, kept_logits = generate(model, inputs)
            assert torch.equal(ids, kept_ids)
            assert torch.equal(logits, kept_logits)
            assert all(stage.kept == stage.tokens for stage in handle.report().stages)
            assert torch.equal(plain, model(**inputs).logits)


@pytest.mark.parametrize("policy", ["keep", "renumber"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("shape", BATCHES)
@pytest.mark.parametrize("name", NAMES)
def test_leaving_equals_being_hidden(name, shape, attention, policy):
    model = tiny.build(attention=attention)
    assert_hides_only(model, BATCHES[shape](), name, policy, MEAN[name])


@pytest.mark.parametrize("policy", ["keep", "renumber"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("shape", BATCHES)
def test_a_static_cache(shape, attention, policy):
    model = tiny.build(attention=attention)
    options = {"cache_implementation": "static"}
    assert_hides_only(model, BATCHES[shape](), "pyramiddrop", policy, 0.5, **options)
    assert_hides_only(model, BATCHES[shape](), "pyramiddrop", policy, 0.6, **options)


def test_rows_without_images_keep_everything():
    model = tiny.build()
    inputs = tiny.batch(tiny.prompt(2, 40, 0, seed=5), tiny.prompt(3, 4, 1, seed=6))
    report = assert_hides_only(model, inputs, "pyramiddrop", "renumber", 0.5)
    assert {stage.sample for stage in report.stages} == {1}


@dataclass(frozen=True)
class Merging(Strategy):
    """Adds all dropped tokens to the first one kept."""

    positions: ClassVar[Positions] = "keep"
    acts_inside: ClassVar[bool] = True

    def default_layers(self, facts: Facts) -> tuple[int, ...]:
        return (2,)

    def plan(self, facts: Facts) -> tuple[Stage, ...]:
        return (Stage(Site.DECODER, (LastRow(2),), 2),)

    def select(self, signals: Signals, k: int) -> Selection:
        batch, n = signals.tokens.shape[:2]
        rows = torch.arange(k).expand(batch, k)
        source = torch.arange(n).expand(batch, n)
        target = torch.where(source < k, source, 0)
        return Selection(rows, n, Mix(source, target, torch.ones(batch, n)))


def test_merged_tokens_are_written_into_their_slots():
    model, inputs = tiny.build(), tiny.one_image()
    seen = {}
    layer = model.model.language_model.layers[2]
    with vtprune.wrap(model, Merging(), keep=5):
        watch = layer.register_forward_pre_hook(
            lambda m, args: seen.setdefault("hidden", args[0]), prepend=False
        )
        model(**inputs)
        watch.remove()
    whole = []
    watch = layer.register_forward_pre_hook(lambda m, args: whole.append(args[0]))
    model(**inputs)
    watch.remove()
    visual = (inputs["input_ids"][0] == tiny.IMAGE).nonzero()[:, 0]
    first = int(visual[0])
    merged = whole[0][0, visual[0]] + whole[0][0, visual[5:]].sum(0)
    torch.testing.assert_close(seen["hidden"][0, first], merged)
    assert seen["hidden"].shape[1] == inputs["input_ids"].shape[1] - tiny.N + 5


@pytest.mark.parametrize("name", NAMES)
def test_after_a_stage_before_the_language_model(name):
    model, inputs = tiny.build(), tiny.ragged()
    second = build(name)
    keep = [0.5, 4] if name == "fastv" else [0.5, 0.6]
    with vtprune.wrap(model, ["divprune", second], keep=keep, positions="keep") as handle:
        ids, _ = generate(model, inputs)
        report = handle.report()
        out = model(**inputs)
        logits, index = out.logits, handle.index
    assert [image.kept for image in report.images] == [18, 18, 18]
    assert {stage.tokens for stage in report.stages if stage.layer == report.stages[0].layer} == {
        18,
        36,
    }
    assert index is not None
    assert logits.shape[:2] == index.shape
    assert torch.equal(logits[:, -1].argmax(-1)[ids[:, 0] != -1], ids[:, 0])


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


def test_what_the_last_token_attends_to_equals_eager():
    inputs = tiny.ragged()
    eager = tiny.build(attention="eager")
    full = eager(**inputs, output_attentions=True).attentions
    for attention in ("sdpa", "eager"):
        model = tiny.build(attention=attention)
        with vtprune.wrap(model, "pyramiddrop", keep=0.6, layers=(2,)) as handle:
            generate(model, inputs, n=1)
            assert handle._decoding is not None
            (row,) = handle._decoding.rows.values()
        visual = inputs["input_ids"] == tiny.IMAGE
        wanted = full[2][:, :, -1].mean(1)
        assert (row - wanted)[visual].abs().max() < 1e-5
        others = full[1][:, :, -1].mean(1)
        assert (row - others)[visual].abs().max() > 1e-3  # one layer off would show


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


def test_a_wrong_position_turns_the_oracle_red(monkeypatch):
    from vtprune.engine.cuts import Cut

    right = Cut.keep

    def late(self, stays, valid, *, renumber):
        cut = right(self, stays, valid, renumber=renumber)
        return cut if cut.moved is None else type(cut)(**{**vars(cut), "moved": cut.moved + 1})

    monkeypatch.setattr(Cut, "keep", late)
    with pytest.raises(AssertionError):
        assert_hides_only(tiny.build(), tiny.ragged(), "pyramiddrop", "renumber", 0.5)


def test_an_uncut_mask_turns_the_oracle_red(monkeypatch):
    from vtprune.engine.cuts import Cut

    monkeypatch.setattr(
        Cut, "_columns", lambda self, mask, static: mask[..., -self.index.shape[1] :]
    )
    with pytest.raises((AssertionError, RuntimeError)):
        assert_hides_only(tiny.build(), tiny.ragged(), "pyramiddrop", "keep", 0.5)


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
