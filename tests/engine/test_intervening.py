"""Edited attention rows: equal to eager attention edited by hand; unedited ones stay bit by bit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import vtprune
from tests import tiny
from tests.engine.edits_reference import changed, greedy
from tests.engine.test_computing import BATCHES, said
from tests.probes import generate
from vtprune.engine import tap
from vtprune.engine.editing import Seen
from vtprune.errors import ConfigError, HookError, UnsupportedError
from vtprune.interventions import Entering, Keys
from vtprune.registry import build
from vtprune.strategies._compute import Compute
from vtprune.types import Facts, Intervention

STEPS = 3


@dataclass(frozen=True)
class Same(Compute):
    """Marks visual tokens and edits nothing."""

    queries: Any = "all"
    before_softmax: bool = False

    def rule(self, layer: int, facts: Facts) -> Intervention:
        return Intervention(self, self.queries, before_softmax=self.before_softmax)

    def mark(self, entering: Entering) -> tuple[Tensor, ...]:
        return (entering.visual,)

    def edit(self, rows: Tensor, keys: Keys) -> Tensor:
        return rows.clone()


def decoder(model: Any) -> Any:
    return model.model.language_model.layers


def rows_of(inputs: dict[str, Tensor], queries: str, length: int, visual: Any = None):
    """By hand: which rows of the whole sequence are edited, per row of the batch.

    ``visual`` ``[B, L]`` bool are by default the placeholders of the tiny LLaVA.
    """
    found = []
    marks = inputs["input_ids"] == tiny.IMAGE if visual is None else visual
    for seen, there in zip(marks.tolist(), inputs["attention_mask"].tolist(), strict=True):
        images = [i for i, own in enumerate(seen) if own]
        rows = [i for i, real in enumerate(there) if real]
        if queries == "text":
            rows = [i for i in rows if images and i > images[-1]]
        rows = {"last": rows[-1:], "visual": images}.get(queries, rows)
        later = list(range(len(there), length)) if queries != "visual" else []
        found.append(rows + later if images else [])
    return found


def rescaled(inputs: dict[str, Tensor], layers: Any, heads: Any, factors: Any, **how: Any):
    """By hand: attention to some keys times a factor, the rows made to sum to 1 again."""
    keys = how.pop("keys", "visual")

    def change(number: int, shares: Tensor, entered: Tensor) -> Tensor:
        shares, length = shares.clone(), shares.shape[3]
        if number not in layers:
            return shares
        ids = inputs["input_ids"]
        for b, rows in enumerate(rows_of(inputs, how.get("queries", "text"), length)):
            visual = [j for j in range(ids.shape[1]) if ids[b, j] == tiny.IMAGE]
            first = int(inputs["attention_mask"][b].argmax())
            others = [j for j in range(length) if j not in visual]
            own = {"visual": visual, "first": [first], "text": others}[keys]
            for h, factor in zip(heads, factors, strict=True):
                some = shares[b, h, rows]
                some[:, own] *= factor
                shares[b, h, rows] = some / some.sum(1, keepdim=True)
        return shares

    return change


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("before_softmax", [False, True])
def test_an_edit_that_changes_nothing_is_bit_identical(attention, before_softmax):
    model, inputs = tiny.build(attention=attention), tiny.ragged()
    ids, logits = generate(model, inputs, STEPS)
    plain = model(**inputs).logits
    with vtprune.wrap(model, Same(before_softmax=before_softmax)) as handle:
        same_ids, same_logits = generate(model, inputs, STEPS)
        assert torch.equal(plain, model(**inputs).logits)
        rules = said(handle)
    assert torch.equal(ids, same_ids)
    assert torch.equal(logits, same_logits)
    assert rules.published == 1
    assert rules.realised > 1  # the rows were made again
    with vtprune.wrap(model, build("rescale_attention", factor=1.0)):
        assert torch.equal(plain, model(**inputs).logits)


@pytest.mark.parametrize(
    ("shape", "attention"),
    [
        ("ragged", "sdpa"),
        *(pytest.param(shape, "eager", marks=pytest.mark.slow) for shape in ("one", "turned")),
        *(pytest.param(shape, "sdpa", marks=pytest.mark.slow) for shape in ("one", "turned")),
    ],
)
@pytest.mark.parametrize(
    ("options", "heads", "factors"),
    [
        ({}, range(4), [3.0] * 4),
        ({"queries": "last", "layers": (1, 3)}, range(4), [3.0] * 4),
        ({"queries": "visual"}, range(4), [3.0] * 4),
        ({"queries": "all", "keys": "text"}, range(4), [3.0] * 4),
        ({"keys": "first", "heads": (3, 0), "factor": (0.2, 5.0)}, (3, 0), (0.2, 5.0)),
    ],
)
def test_a_row_equals_the_one_edited_by_hand(shape, attention, options, heads, factors):
    options = {"factor": 3.0, **options}
    inputs, strategy = BATCHES[shape](), build("rescale_attention", **options)
    model, eager = tiny.build(attention=attention), tiny.build(attention="eager")
    plain = generate(eager, inputs, STEPS)[1]
    with vtprune.wrap(model, strategy):
        ids, logits = generate(model, inputs, STEPS)
    layers = options.get("layers", range(4))
    how = {name: options[name] for name in ("queries", "keys") if name in options}
    with changed(decoder(eager), weights=rescaled(inputs, layers, heads, factors, **how)):
        wanted_ids, wanted = greedy(eager, inputs, STEPS)
    assert torch.equal(ids, wanted_ids)
    assert (logits - wanted).abs().max() < 1e-4
    assert (logits - plain).abs().max() > 1e-2


def test_two_edits_of_a_layer_act_one_after_the_other():
    inputs, model, eager = tiny.ragged(), tiny.build(), tiny.build(attention="eager")
    first = build("rescale_attention", factor=3.0, layers=(1,))
    second = build("rescale_attention", factor=(0.1,), keys="first", heads=(2,), layers=(1, 2))
    with vtprune.wrap(model, [first, second]):
        ids, logits = generate(model, inputs, STEPS)
    one = rescaled(inputs, (1,), range(4), [3.0] * 4)
    other = rescaled(inputs, (1, 2), (2,), (0.1,), keys="first")
    with changed(decoder(eager), weights=lambda n, x, h: other(n, one(n, x, h), h)):
        wanted_ids, wanted = greedy(eager, inputs, STEPS)
    assert torch.equal(ids, wanted_ids)
    assert (logits - wanted).abs().max() < 1e-4


def test_without_decoded_tokens_only_the_prompt_is_edited():
    inputs, model, eager = tiny.ragged(), tiny.build(), tiny.build(attention="eager")
    with vtprune.wrap(model, build("rescale_attention", factor=4.0, decoded=False)):
        ids, logits = generate(model, inputs, STEPS)
    length = inputs["input_ids"].shape[1]
    edit = rescaled(inputs, range(4), range(4), [4.0] * 4)

    def change(number: int, shares: Tensor, entered: Tensor) -> Tensor:
        return torch.cat([edit(number, shares, entered)[:, :, :length], shares[:, :, length:]], 2)

    with changed(decoder(eager), weights=change):
        wanted_ids, wanted = greedy(eager, inputs, STEPS)
    assert torch.equal(ids, wanted_ids)
    assert (logits - wanted).abs().max() < 1e-4


def test_what_a_query_sees_by_each_kind_of_mask():
    """The last 2 of 5 tokens ask; the first one is padding."""
    padding = torch.tensor([[False, True, True, True, True]])
    there = torch.tensor([[0, 1, 1, 1, 0], [0, 1, 1, 1, 1]]).bool()
    rows = torch.tensor([[1, 0]])
    whole = torch.zeros(1, 1, 2, 5).masked_fill(~there, -1e30)
    for mask in (there[None, None], whole, padding.long()):
        assert torch.equal(Seen(mask, True, 2, 5).of(rows)[0, 0], there.flip(0))
    assert Seen(None, True, 2, 5).of(rows)[0, 0].sum(1).tolist() == [5, 4]
    assert Seen(None, False, 2, 5).of(rows).all()
    for mask in (None, padding.long(), torch.ones(1, 1, 5, 5).tril().bool()):
        order = Seen(mask, True, 5, 5).row(0, torch.arange(1, 5))
        assert torch.equal(order, torch.ones(4, 4).tril().bool())


# -- with other strategies, and ways of calling ----------------------------------------------------


@pytest.mark.parametrize("first", ["divprune", "fastv"])
def test_behind_pruning_the_tokens_that_are_left_are_edited(first):
    """Dropped tokens are hidden from the whole sequence, from their layer on."""
    inputs, model, eager = tiny.ragged(), tiny.build(), tiny.build(attention="eager")
    edit = build("rescale_attention", factor=4.0, layers=(2, 3))
    strategies: Any = [build(first) if first == "divprune" else build(first, layers=(2,)), edit]
    with vtprune.wrap(model, strategies, keep=9, positions="keep") as handle:
        ids, logits = generate(model, inputs, STEPS)
        final = handle.final
    assert final is not None
    gone = inputs["attention_mask"].bool()
    for b, columns in enumerate(final):
        gone[b, columns[columns >= 0]] = False
    assert gone.any()
    begin = 0 if first == "divprune" else 2
    edit_by_hand = rescaled(inputs, (2, 3), range(4), [4.0] * 4)

    def hide(number: int, scores: Tensor, entered: Tensor) -> Tensor:
        if number < begin:
            return scores
        hidden = torch.nn.functional.pad(gone, (0, scores.shape[3] - gone.shape[1]))
        return scores.masked_fill(hidden[:, None, None], -1e30)

    with changed(decoder(eager), logits=hide, weights=edit_by_hand):
        wanted_ids, wanted = greedy(eager, inputs, STEPS)
    assert torch.equal(ids, wanted_ids)
    assert (logits - wanted).abs().max() < 1e-4


def test_beside_a_rule_of_visual_rows():
    """Frozen visual rows leave the text's rows to the edit, in one layer or in two."""
    inputs, model = tiny.ragged(), tiny.build()
    rule, edit = build("shortv", layers=(1, 2)), build("rescale_attention", factor=4.0, layers=(2,))
    none = build("rescale_attention", factor=1.0, layers=(2,))
    with vtprune.wrap(model, rule):
        alone = generate(model, inputs, STEPS)[1]
    for listed in ([rule, none], [none, rule]):
        with vtprune.wrap(model, listed):
            assert torch.equal(alone, generate(model, inputs, STEPS)[1])
    with vtprune.wrap(model, [rule, edit]):
        both = generate(model, inputs, STEPS)[1]
    with vtprune.wrap(model, [edit, rule]):
        assert torch.equal(both, generate(model, inputs, STEPS)[1])
    assert (alone - both).abs().max() > 1e-2


@pytest.mark.parametrize(
    "other", [("zipvl", {}), ("psa", {}), ("shortv", {"queries": "all"})], ids=lambda o: o[0]
)
def test_rules_that_do_not_go_together(other):
    name, options = other
    edit = build("rescale_attention", layers=(1,), **options)
    with pytest.raises(ConfigError, match="Two strategies say what layer 1 computes"):
        vtprune.wrap(tiny.build(), [build(name, layers=(1,)), edit])


def test_a_cache_whose_heads_hold_different_tokens():
    model, inputs = tiny.build(), tiny.ragged()
    edit, evict = build("rescale_attention", layers=(1,)), build("snapkv", layers=(2, 3))
    for listed in ([edit, "snapkv"], ["snapkv", edit]):
        with pytest.raises(ConfigError, match="edits attention in layer 1, another lets each head"):
            vtprune.wrap(model, listed, keep=9)
    for listed in ([edit, evict], [evict, edit]):
        with vtprune.wrap(model, listed, keep=9):
            assert generate(model, inputs, STEPS)[1].isfinite().all()


def test_a_static_cache_a_loop_by_hand_and_beams():
    model, inputs = tiny.build(), tiny.ragged()
    strategy = build("rescale_attention", factor=4.0)
    with vtprune.wrap(model, strategy):
        ids, logits = generate(model, inputs, STEPS)
        static = generate(model, inputs, STEPS, cache_implementation="static")
        assert torch.equal(ids, static[0])
        assert (logits - static[1]).abs().max() < 1e-4
        out, mask, found = model(**inputs), inputs["attention_mask"], []
        for _ in range(STEPS):
            scores = out.logits[:, -1].index_fill(1, torch.tensor([tiny.IMAGE]), -1e30)
            found.append(scores.argmax(-1))
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            out = model(
                input_ids=found[-1][:, None],
                attention_mask=mask,
                past_key_values=out.past_key_values,
            )
        assert torch.equal(torch.stack(found, 1), ids)
        one, options = tiny.one_image(), {"max_new_tokens": STEPS, "do_sample": True, "top_k": 1}
        twice = model.generate(**one, **options, num_return_sequences=2)
        assert torch.equal(twice, model.generate(**one, **options).expand(2, -1))


def test_a_row_without_images_is_left_alone():
    inputs = tiny.batch(tiny.prompt(2, 40, 0, seed=5), tiny.prompt(3, 4, 1, seed=6))
    model = tiny.build()
    plain = generate(model, inputs, STEPS)[1]
    with vtprune.wrap(model, build("rescale_attention", factor=4.0, queries="all", keys="text")):
        made = generate(model, inputs, STEPS)[1]
    assert torch.equal(plain[0], made[0])
    assert not torch.equal(plain[1], made[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_gradients(dtype):
    model, inputs = tiny.build().to(dtype), tiny.ragged()
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    with vtprune.wrap(model, build("rescale_attention", factor=4.0)):
        out = model(**inputs, labels=inputs["input_ids"])
        out.loss.backward()
    assert out.logits.dtype == dtype
    assert out.logits[inputs["attention_mask"].bool()].isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.lm_head.parameters())
    assert decoder(model)[0].self_attn.q_proj.weight.grad.isfinite().all()


# -- what is refused and what is left --------------------------------------------------------------


def test_nothing_is_left_on_the_model():
    model, inputs = tiny.build(), tiny.one_image()
    before = model(**inputs).logits
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    vtprune.wrap(model, build("rescale_attention", factor=4.0)).remove()
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert torch.equal(model(**inputs).logits, before)


def test_heads_and_attentions_that_there_are_not(monkeypatch):
    model, inputs = tiny.build(), tiny.one_image()
    with pytest.raises(ConfigError, match=r"heads=\(4,\): layer 0 has heads 0 to 3"):
        vtprune.wrap(model, build("rescale_attention", heads=(4,)))
    text = model.model.language_model.config
    text._attn_implementation = "flex_attention"
    with pytest.raises(UnsupportedError, match="'flex_attention' does not say by its mask"):
        vtprune.wrap(model, build("rescale_attention"))
    text._attn_implementation = "sdpa"
    monkeypatch.setattr(tap, "_pass_through", lambda original: original)
    with (
        vtprune.wrap(model, build("rescale_attention")),
        pytest.raises(HookError, match="did not call the attention interface"),
    ):
        model(**inputs)


def test_the_report_says_who_edits_what():
    model, inputs = tiny.build(), tiny.one_image()
    with vtprune.wrap(model, build("rescale_attention", heads=(1,), layers=(3,))) as handle:
        model(**inputs)
        assert "layers [3]: rows of the text after the image in 1 heads edited by Resc" in str(
            handle.report()
        )
