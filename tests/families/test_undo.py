"""Wrapping and removing leaves every family as it was, however often and whatever happened."""

from __future__ import annotations

import gc
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import vtprune
from tests.families.batches import Batch, batch, new_ids
from vtprune.engine import tap, wrap

Pair = tuple[Any, Any]
SITES: list[tuple[Any, Any]] = [
    ("divprune", 0.5),
    ("fastervlm", 0.5),
    ("fastv", 0.5),
    ("visionzip", 0.5),
    ("pyramiddrop", 0.8),
    ("transprune", 0.8),
    (["fastervlm", "fastv"], [0.7, 0.5]),
]


def state(model: nn.Module) -> dict[str, Any]:
    """Attributes, hooks of every kind and flags of every module."""
    found = {}
    for name, module in model.named_modules():
        own = vars(module)
        hooks = {
            key: list(hooks)
            for key, hooks in own.items()
            if isinstance(hooks, OrderedDict) and "hook" in key
        }
        found[name] = (sorted(own), hooks, module.training, type(module))
    return found


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def live() -> tuple[int, int]:
    """Numbers of all objects and of tensors that the collector knows."""
    gc.collect()
    objects = gc.get_objects()
    return len(objects), sum(issubclass(type(x), Tensor) for x in objects)


def break_off(model: Any, inputs: Batch, number: int) -> None:
    """Lets a call fail in a decoder layer or where the logits are made."""
    text = model.get_decoder()
    target = model.lm_head if number % 2 else text.layers[-1]

    def fail(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError

    hook = target.register_forward_pre_hook(fail)
    try:
        with pytest.raises(ZeroDivisionError):
            model(**inputs)
    finally:
        hook.remove()


def cycle(model: Any, inputs: Batch, number: int, every: int) -> None:
    """Wraps, perhaps calls, and removes; each strategy in turn meets each kind of call."""
    strategy, keep = SITES[number % len(SITES)]
    handle = vtprune.wrap(model, strategy, keep=keep)
    turn = (number + number // len(SITES)) % every
    if turn == 0:
        model(**inputs)
        assert handle.report().images
    elif turn == 1:
        model.generate(**inputs, max_new_tokens=2)
        assert handle.report().images
    elif turn == 2:
        break_off(model, inputs, number // every)
    handle.remove()


@torch.no_grad()
def check(pair: Pair, kind: str, cycles: int, warm: int | None, every: int) -> None:
    """Compares a model with itself after wrapping it ``cycles`` times.

    Memory is flat from cycle ``warm`` on; before it, what runs for the first time fills caches.
    """
    model, processor = pair
    inputs = batch(processor, kind)
    ids, logits = new_ids(model, inputs), model(**inputs).logits  # the first call adds hooks
    before, tensors, entries = state(model), weights(model), dict(_entries())
    objects = None
    for number in range(cycles):
        cycle(model, inputs, number, every)
        assert dict(_entries()) == entries
        if number + 1 == warm:
            objects = live()
    if objects is not None:
        grown = [after - then for after, then in zip(live(), objects, strict=True)]
        assert grown[1] <= 0, f"{grown[1]} tensors more than after {warm} cycles"
        assert grown[0] < cycles, f"{grown[0]} objects more than after {warm} cycles"
    assert state(model) == before
    assert not +tap._users and not tap._previous and not wrap._live
    assert wrap._running.get() is None and tap._reading.get() is None
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, tensors[name]), name
    assert torch.equal(new_ids(model, inputs), ids)
    assert torch.equal(model(**inputs).logits, logits)


def _entries() -> dict[str, Any]:
    return ALL_ATTENTION_FUNCTIONS._local_mapping


def test_a_few_cycles_leave_nothing_behind(built: Pair) -> None:
    check(built, "one", cycles=7, warm=None, every=3)


@pytest.mark.slow
def test_200_cycles_leave_nothing_behind(built: Pair) -> None:
    check(built, "ragged", cycles=200, warm=50, every=8)


def test_a_refused_wrap_leaves_nothing_behind(built: Pair) -> None:
    model, _ = built
    before, entries = state(model), dict(_entries())
    refused: list[dict[str, Any]] = [
        {"keep": 0},
        {"keep": 9, "positions": "x"},
        {"keep": 9, "layers": (999,)},
    ]
    for wrong in refused:
        with pytest.raises(vtprune.VTPruneError):
            vtprune.wrap(model, "fastervlm", **wrong)
    assert state(model) == before and dict(_entries()) == entries
    assert not +tap._users


def test_an_interrupted_encoder_leaves_nothing_behind(built: Pair) -> None:
    model, processor = built
    inputs = batch(processor, "one")
    model(**inputs)
    before = state(model)
    with vtprune.wrap(model, "visionzip", keep=0.5) as handle:
        right = new_ids(model, inputs, 2)
        for modality in handle.adapter.modalities[:1]:
            block = handle.adapter.blocks(modality)[handle.adapter.facts.feature_block]
            hook = block.register_forward_pre_hook(lambda *a: 1 / 0)
            for call in (model, model.generate):
                with pytest.raises(ZeroDivisionError):
                    call(**inputs)
            hook.remove()
        assert torch.equal(new_ids(model, inputs, 2), right)
    assert state(model) == before


def test_leaving_by_an_error_removes(built: Pair) -> None:
    model, processor = built
    inputs = batch(processor, "one")
    model(**inputs)
    before = state(model)
    both = ["divprune", "fastv"]
    with pytest.raises(ZeroDivisionError), vtprune.wrap(model, both, keep=[0.7, 0.5]):
        model(**inputs)
        raise ZeroDivisionError
    assert state(model) == before
