"""After remove() the model is as it was; one wrap at a time; models do not disturb each other."""

from __future__ import annotations

import inspect

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import vtprune
from tests import tiny
from vtprune.engine import tap


def state(model):
    """Everything that wrapping might touch: attributes and hooks of every module."""
    return {
        name: (sorted(vars(module)), list(module._forward_hooks), list(module._forward_pre_hooks))
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_remove_gives_the_model_back(attention):
    model, inputs = tiny.build(attention=attention), tiny.ragged()
    plain, logits = model.generate(**inputs, max_new_tokens=5), model(**inputs).logits
    before = state(model)
    entries = dict(ALL_ATTENTION_FUNCTIONS._local_mapping)
    for name in ("visionzip", "fastervlm"):
        handle = vtprune.wrap(model, name, keep=9)
        assert ALL_ATTENTION_FUNCTIONS._local_mapping != entries
        model.generate(**inputs, max_new_tokens=5)
        model(**inputs)
        handle.remove()
        handle.remove()
    assert state(model) == before
    assert ALL_ATTENTION_FUNCTIONS._local_mapping == entries
    assert torch.equal(model.generate(**inputs, max_new_tokens=5), plain)
    assert torch.equal(model(**inputs).logits, logits)


def test_previous_instance_attributes_return():
    model = tiny.build()
    original, calls = model.forward, []

    def counted(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    model.forward = counted
    with vtprune.wrap(model, "strided", keep=9):
        assert model.forward is not counted
    assert model.forward is counted


def test_a_registered_attention_function_returns():
    model = tiny.build()
    inner = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def mine(*args, **kwargs):
        return inner(*args, **kwargs)

    ALL_ATTENTION_FUNCTIONS["sdpa"] = mine
    try:
        with vtprune.wrap(model, "fastervlm", keep=9):
            model.generate(**tiny.one_image(), max_new_tokens=1)
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is mine
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]


def test_the_signature_stays():
    model = tiny.build()
    forward, generate = inspect.signature(model.forward), inspect.signature(model.generate)
    with vtprune.wrap(model, "strided", keep=9):
        assert inspect.signature(model.forward) == forward
        assert inspect.signature(model.generate) == generate


@pytest.mark.parametrize("part", ["model", "vision_tower", "language_model"])
def test_wrapping_twice_is_refused(part):
    model = tiny.build()
    with vtprune.wrap(model, "strided", keep=9):
        with pytest.raises(vtprune.UnsupportedError, match="wrapped already"):
            vtprune.wrap(model, "random", keep=9)
        inner = model.model if part == "model" else getattr(model.model, part)
        with pytest.raises((vtprune.UnsupportedError, vtprune.ConfigError)):
            vtprune.wrap(inner, "random", keep=9)
    vtprune.wrap(model, "random", keep=9).remove()


def test_a_model_around_a_wrapped_one_is_refused():
    model, outer = tiny.build(), tiny.build()
    outer.add_module("inner", model)
    with (
        vtprune.wrap(model, "strided", keep=9),
        pytest.raises(vtprune.UnsupportedError, match="wrapped already"),
    ):
        vtprune.wrap(outer, "random", keep=9)


def test_two_models_share_a_tower_in_turn():
    one, two = tiny.build(seed=0), tiny.build(seed=1)
    two.model.vision_tower = one.model.vision_tower
    inputs = tiny.one_image()
    plain = two.generate(**inputs, max_new_tokens=5)
    with vtprune.wrap(one, "visionzip", keep=9) as first:
        assert torch.equal(two.generate(**inputs, max_new_tokens=5), plain)
        with vtprune.wrap(two, "fastervlm", keep=4) as second:
            one.generate(**inputs, max_new_tokens=5)
            two.generate(**inputs, max_new_tokens=5)
            assert [i.kept for i in first.report().images] == [9]
            assert [i.kept for i in second.report().images] == [4]
    assert torch.equal(two.generate(**inputs, max_new_tokens=5), plain)
    assert not +tap._users


def test_an_exception_in_the_middle_leaves_nothing_behind(monkeypatch):
    model, inputs = tiny.build(), tiny.ragged()
    model.generate(**inputs, max_new_tokens=1)  # transformers adds its own hooks on first use
    before = state(model)
    with vtprune.wrap(model, "visionzip", keep=9) as handle:
        right = model.generate(**inputs, max_new_tokens=5)
        for target in (model.model.multi_modal_projector, model.model.language_model.layers[2]):
            with monkeypatch.context() as patch:
                patch.setattr(target, "forward", lambda *a, **k: 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    model.generate(**inputs, max_new_tokens=5)
                with pytest.raises(ZeroDivisionError):
                    model(**inputs)
            assert torch.equal(model.generate(**inputs, max_new_tokens=5), right)
        handle.remove()
    assert state(model) == before


def test_a_failed_installation_leaves_nothing_behind(monkeypatch):
    model = tiny.build()
    before = state(model)
    entries = dict(ALL_ATTENTION_FUNCTIONS._local_mapping)
    monkeypatch.setattr(model.config.vision_config, "_attn_implementation_internal", "nonsense")
    with pytest.raises(vtprune.HookError, match="nonsense"):
        vtprune.wrap(model, "fastervlm", keep=9)
    assert state(model) == before
    assert ALL_ATTENTION_FUNCTIONS._local_mapping == entries


def test_a_hook_that_is_never_called_is_an_error(monkeypatch):
    model, inputs = tiny.build(), tiny.one_image()
    with vtprune.wrap(model, "fastervlm", keep=9):
        monkeypatch.setattr(model.model.vision_tower.config, "_attn_implementation", "eager")
        with pytest.raises(vtprune.HookError, match="never read"):
            model.generate(**inputs, max_new_tokens=1)


def test_timing_and_report():
    model, inputs = tiny.build(), tiny.ragged()
    with vtprune.wrap(model, "fastervlm", keep=0.25) as handle:
        assert handle.report().images == ()
        handle.timing = True
        model.generate(**inputs, max_new_tokens=1)
        report = handle.report()
    assert [(i.sample, i.tokens, i.kept) for i in report.images] == [(0, 36, 9)] + [(1, 36, 9)] * 2
    assert report.layers == (2,)
    assert set(report.ms) == {"encode", "language"}
    assert "9 of 36 visual tokens" in str(report)
