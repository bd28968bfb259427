"""What an onlooker sees is what eager attention and hidden states of the same call say."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

import vtprune
from tests import tiny
from tests.families import batches
from tests.families.eager import model_of
from vtprune import HookError
from vtprune.engine.onlooker import Onlooker, last_rows

NEW = 4
FAMILIES = ("llava", "qwen2_5_vl")


def score(hidden):
    return hidden.float().square().mean(-1)


def watched(model, inputs, strategy=None, ends=(), new=NEW, **options):
    """Returns what an onlooker saw, the ids, and the handle (removed), if there is a strategy."""
    handle = None if strategy is None else vtprune.wrap(model, strategy, **options)
    try:
        onlooker = Onlooker(model, inputs, score, handle)
        with onlooker.looking():
            ids = model.generate(**inputs, max_new_tokens=new, do_sample=False)
        made = ids[:, inputs["input_ids"].shape[1] :]
        return onlooker.seen(made, ends), made, handle
    finally:
        if handle is not None:
            handle.remove()


@cache
def model_and_inputs(family, kind="ragged"):
    model, processor = model_of(family, "sdpa")
    return model, batches.batch(processor, kind)


def told(family, inputs, strategy=None, **options):
    """Attention ``[NL, T - 1, B, H, keys]`` and entering states as an eager copy returns them."""
    model = model_of(family, "eager")[0]
    handle = None if strategy is None else vtprune.wrap(model, strategy, **options)
    try:
        out = model.generate(
            **inputs,
            max_new_tokens=NEW,
            do_sample=False,
            output_attentions=True,
            output_hidden_states=True,
            return_dict_in_generate=True,
        )
        columns = (None, None) if handle is None else (handle.index, handle.final)
    finally:
        if handle is not None:
            handle.remove()
    return out, columns


def spread(rows, columns, length):
    """Rows ``[B, n]`` at their columns ``[B, length]``, one by one."""
    full = torch.zeros(len(rows), length)
    for b, row in enumerate(columns.tolist()):
        for value, column in zip(rows[b].tolist(), row, strict=False):
            if column >= 0:
                full[b, column] = value
    return full


def check(seen, out, columns_of, length):
    for number in range(len(out.attentions[0])):
        columns, rows = columns_of(number), []
        for step in out.attentions[1:]:
            rows.append(step[number][:, :, -1].float())  # [B, H, keys]
        mean = sum(spread(row.mean(1), columns, length) for row in rows) / len(rows)
        entropy = sum(-torch.xlogy(row, row).sum(-1).mean(1) for row in rows) / len(rows)
        torch.testing.assert_close(seen.attention[number], mean, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(seen.entropy[number], entropy, atol=1e-4, rtol=1e-4)
        there = spread(torch.ones(columns.shape), columns, length).bool()
        assert torch.equal(seen.there[number], there)
        entering = out.hidden_states[0][number]  # what the layer before gave
        own = spread(score(entering), columns_of(max(number - 1, 0)), length) * there
        assert torch.equal(seen.scores[number].isnan(), ~there)
        torch.testing.assert_close(seen.scores[number].nan_to_num(), own, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_unwrapped_model(family):
    model, inputs = model_and_inputs(family)
    before = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    seen, made, _ = watched(model, inputs)
    assert torch.equal(before[:, -NEW:], made)
    out, _ = told(family, inputs)
    assert torch.equal(out.sequences[:, -NEW:], made)
    mask = inputs["attention_mask"].bool()
    every = torch.arange(mask.shape[1]).expand(mask.shape).masked_fill(~mask, -1)
    check(seen, out, lambda number: every, mask.shape[1])
    assert seen.rows.tolist() == [NEW - 1] * len(mask)
    assert not model.generate(**inputs, max_new_tokens=1).isnan().any()  # the hooks are off
    hooks = [layer._forward_pre_hooks for layer in Onlooker(model, inputs, score)._layers]
    assert not any(hooks)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("strategy", ["fastervlm", "fastv"])
def test_a_wrapped_model(family, strategy):
    model, inputs = model_and_inputs(family)
    inside = {"layers": (2,), "keep": 0.75}
    options: dict[str, Any] = inside if strategy == "fastv" else {"keep": 0.5}
    seen, made, handle = watched(model, inputs, strategy, **options)
    out, (index, final) = told(family, inputs, strategy, **options)
    assert torch.equal(out.sequences[:, -NEW:], made)
    length = inputs["input_ids"].shape[1]
    first = 2 if strategy == "fastv" else 0
    assert handle is not None and final is not None and final.shape[1] < length
    check(seen, out, lambda number: final if number >= first else index, length)
    for b in range(len(made)):
        entering = [int((there[b] & seen.visual[b]).sum()) for there in seen.there]
        assert tuple(entering) == handle.report().entering(b)


def test_rows_end_with_the_answer():
    model, inputs = tiny.build(), tiny.ragged()
    whole, made, _ = watched(model, inputs)
    first, third = int(made[0, 0]), int(made[1, 2])
    alone, *_ = watched(model, inputs, ends=[first])
    assert alone.rows[0] == 0
    prompt, *_ = watched(model, inputs, new=1)  # one token: none of them is asked again
    assert prompt.rows.tolist() == [0, 0]
    assert torch.equal(alone.attention[:, 0], prompt.attention[:, 0])
    if third not in made[1, :2].tolist():
        some, *_ = watched(model, inputs, ends=[third])
        two, *_ = watched(model, inputs, new=3)
        assert some.rows[1] == 2
        torch.testing.assert_close(some.attention[:, 1], two.attention[:, 1])
    assert not torch.equal(whole.attention, alone.attention)
    sums = prompt.attention.sum(-1)  # of the prompt's rows all goes to the prompt
    torch.testing.assert_close(sums, torch.ones_like(sums))
    assert (whole.attention.sum(-1) < 1).all()


@pytest.mark.parametrize("strategy", ["shortv(layers=(1, 2))", "zipvl(tau=0.9)"])
def test_rules_act_while_one_looks_on(strategy):
    """An onlooker reads the model's own calls, so nothing is taken for a look ahead."""
    model, inputs = tiny.build(), tiny.one_image()
    with vtprune.wrap(model, strategy) as handle:
        plain = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
        rules = handle.report().rules
    seen, made, handle = watched(model, inputs, strategy)
    assert torch.equal(plain[:, -NEW:], made)
    assert handle is not None and handle.report().rules == rules
    assert rules is not None and rules.realised < 1
    if strategy.startswith("zipvl"):
        assert bool((seen.there.sum(-1) < inputs["input_ids"].shape[1]).any())
        last, *_ = watched(model, inputs, strategy, new=1)
        assert torch.equal((last.attention > 0), last.there)
        torch.testing.assert_close(last.attention.sum(-1), torch.ones(last.entropy.shape))


def test_a_call_that_was_not_made_is_an_error():
    model, inputs = tiny.build(), tiny.one_image()
    onlooker = Onlooker(model, inputs, score)
    with pytest.raises(HookError, match="once per layer and token"):
        onlooker.seen(torch.zeros(1, 1).long(), ())
    with onlooker.looking():
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
    with pytest.raises(HookError, match="greedy"):
        onlooker.seen(torch.zeros(1, 4).long(), ())


def test_last_rows_take_every_kind_of_mask():
    torch.manual_seed(0)
    q, k = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 5, 8)
    seen = torch.tensor([[0, 1, 1, 0, 1], [1, 1, 1, 1, 1]]).bool()
    logits = q[:, :, -1:] @ k.repeat_interleave(2, 1).mT * 0.5
    wanted = logits.masked_fill(~seen[:, None, None], -torch.inf).softmax(-1)[:, :, 0]
    bools = seen[:, None, None].expand(-1, -1, 3, -1)
    added = torch.zeros(2, 1, 3, 5).masked_fill(~bools, torch.finfo(torch.float32).min)
    for mask in (bools, added, seen.long()):
        torch.testing.assert_close(last_rows(q, k, mask, 0.5), wanted)
    torch.testing.assert_close(last_rows(q, k, None, 0.5), logits.softmax(-1)[:, :, 0])
    plain = (q[:, :, -1:] @ k.repeat_interleave(2, 1).mT * 8**-0.5).softmax(-1)[:, :, 0]
    torch.testing.assert_close(last_rows(q, k, None, None), plain)
