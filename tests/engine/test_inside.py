"""Stages inside the language model: keep all is bit-identical; leaving equals being hidden."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch

import vtprune
from tests import tiny
from tests.families.eager import last_flow, recording
from tests.families.merges import merging
from tests.families.reference import mixed
from tests.probes import generate
from vtprune.registry import build, keeping_names, strategy_class
from vtprune.types import (
    DecoderNeed,
    Facts,
    KeyNorm,
    LastFlow,
    Normed,
    Selection,
    Signals,
    Site,
    Stage,
    Strategy,
)

BATCHES = {"one": tiny.one_image, "ragged": tiny.ragged}
NAMES = [name for name in keeping_names() if strategy_class(name).acts_inside]
MEAN = {"dart": 9, "fastv": 9, "pyramiddrop": 0.5, "transprune": 0.5}
MEAN |= {"sparsevlm": 0.5, "sparsevlm_plus": 0.5}


@torch.no_grad()
def reference(model, inputs, decoding, policy, chosen, steps=10):
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
            cut, hidden = decoding.cut(number), hidden.clone()
            for b, (columns, selection) in chosen.get(number, {}).items():
                slots = selection.slots[0]
                slots = slots.sort().values if policy == "renumber" else slots
                hidden[b, columns[slots]] = mixed(selection, hidden[b, columns])
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
    wrapped = vtprune.wrap(model, strategy, keep=keep, positions=policy)
    with merging() as chosen, wrapped as handle:
        ids, logits = generate(model, inputs, **options)
        decoding, report = handle._decoding, handle.report()
    assert decoding is not None
    assert report.stages
    assert all(stage.kept < stage.tokens for stage in report.stages)
    wanted_ids, wanted = reference(model, inputs, decoding, policy, chosen)
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
    assert_hides_only(model, BATCHES[shape](), "transprune", policy, 0.5, **options)


def test_rows_without_images_keep_everything():
    model = tiny.build()
    inputs = tiny.batch(tiny.prompt(2, 40, 0, seed=5), tiny.prompt(3, 4, 1, seed=6))
    report = assert_hides_only(model, inputs, "pyramiddrop", "renumber", 0.5)
    assert {stage.sample for stage in report.stages} == {1}


@pytest.mark.parametrize("name", NAMES)
def test_after_a_stage_before_the_language_model(name):
    model, inputs = tiny.build(), tiny.ragged()
    second = build(name)
    keep = [0.5, 0.6 if MEAN[name] == 0.5 else 4]  # a mean over layers, or a count
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


@dataclass(frozen=True)
class Reading(Strategy):
    """Reads one quantity of the layer before it; all tokens stay."""

    need: DecoderNeed
    acts_inside: ClassVar[bool] = True

    def plan(self, facts: Facts) -> tuple[Stage, ...]:
        return (Stage(Site.DECODER, (self.need,), self.need.layer + 1),)


@dataclass(frozen=True)
class Watching(Strategy):
    """Keeps the signals that it was given, by default before layer 2; the first tokens stay."""

    seen: list[Signals] = field(default_factory=list, hash=False)
    acts_inside: ClassVar[bool] = True

    def default_layers(self, facts: Facts) -> tuple[int, ...]:
        return (2,)

    def plan(self, facts: Facts) -> tuple[Stage, ...]:
        (layer,) = self.used_layers(facts)
        return (Stage(Site.DECODER, (KeyNorm(1), Normed(2)), layer),)

    def select(self, signals: Signals, k: int) -> Selection:
        self.seen.append(signals)
        n = signals.n
        return Selection(torch.arange(k).expand(len(signals.tokens), k), n)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_keys_and_normed_states_equal_eager_behind_the_image_too(attention):
    inputs = tiny.ragged()
    eager = tiny.build(attention="eager")
    out = eager(**inputs, output_hidden_states=True)
    wanted = {
        KeyNorm(1): out.past_key_values.layers[1].keys.abs().sum((1, 3)),
        Normed(2): eager.model.language_model.norm(out.hidden_states[2]),
    }
    watching = Watching()
    with vtprune.wrap(tiny.build(attention=attention), watching, keep=5) as handle:
        handle.model(**inputs)
    visual, valid = inputs["input_ids"] == tiny.IMAGE, inputs["attention_mask"].bool()
    assert len(watching.seen) == 2  # one image in one row, two in the other
    for signals in watching.seen:
        b = 0 if signals.n == tiny.N else 1
        last = int(visual[b].nonzero()[-1])
        inside = signals.inside
        assert inside is not None
        assert inside.starts == (int((valid[b] & (visual[b].cumsum(0) == 0)).sum()),)
        for need, full in wanted.items():
            torch.testing.assert_close(signals.values[need][0], full[b, visual[b]])
            torch.testing.assert_close(inside.after[0][need], full[b, last + 1 :])
            assert signals.values[need].dtype == torch.float32


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_what_flows_after_a_cut_is_of_the_tokens_still_there(attention):
    """And of the last prompt token; padding and words are 0."""
    inputs, need = tiny.ragged(), LastFlow(2)
    model = tiny.build(attention="eager")
    strategies = [build("fastv", layers=(1,)), Reading(need)]
    with vtprune.wrap(model, strategies, keep=[9, 9]), torch.no_grad():
        module = model.model.language_model.layers[2].self_attn
        with recording([module]) as calls:
            model(**inputs)
    ((q, k, v, _),) = calls[module]
    model = tiny.build(attention=attention)
    with vtprune.wrap(model, strategies, keep=[9, 9]) as handle, torch.no_grad():
        model(**inputs)
        decoding = handle._decoding
    assert decoding is not None
    columns = decoding.cuts[1].index
    there = (inputs["input_ids"] == tiny.IMAGE).gather(1, columns.clamp(min=0)) & (columns >= 0)
    assert there.sum(1).tolist() == [9, 9]
    wanted = torch.zeros(inputs["input_ids"].shape)
    for b, own in enumerate(last_flow(q, k, v, there, 8**-0.5)):
        wanted[b, columns[b, there[b]]] = own[there[b]]
    assert (decoding.rows[need] - wanted).abs().max() < 1e-5


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
