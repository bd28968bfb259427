"""Visual tokens that a layer makes anew of the tower's features: what enters, and what is cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import vtprune
from tests import tiny
from tests.engine.rules_reference import projected, reference
from tests.engine.test_computing import BATCHES, Given, assert_by_definition, rules_of, said
from tests.probes import generate
from tests.projectors import random_projectors
from vtprune.engine import computing, encoder
from vtprune.engine.decoding import Decoding
from vtprune.errors import InputError
from vtprune.projectors import Projected
from vtprune.registry import build
from vtprune.types import Patches, RowRule

PROJECTORS = random_projectors()
SAISA = build("saisa", projectors=PROJECTORS)


def made(layer: int, **rule: Any) -> RowRule:
    return RowRule(**rule, maker=Projected(layer, Patches(2), PROJECTORS))


def entering(model: Any, number: int) -> list[Tensor]:
    """What enters a layer after its hooks, call by call."""
    seen: list[Tensor] = []
    norm = model.model.language_model.layers[number].input_layernorm
    norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    return seen


@pytest.mark.parametrize("layers", [(0,), (2,), (1, 3), (0, 1, 2, 3)])
@pytest.mark.parametrize("shape", BATCHES)
def test_some_layers_equal_the_definition(shape, layers):
    strategy = build("saisa", projectors=PROJECTORS, layers=layers)
    report = assert_by_definition(tiny.build(), BATCHES[shape](), strategy)
    assert report.rules is not None
    assert list(report.rules.layers.values()) == [layers]


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}])
@pytest.mark.parametrize("rule", [{}, {"attend": "self"}, {"attend": "none"}, {"mlp": 0.0}])
def test_what_is_made_may_compute_too(rule, options):
    model, strategy = tiny.build(), Given(given=made(1, **rule), layers=(1, 2))
    assert_by_definition(model, tiny.ragged(), strategy, **options)


def test_a_tower_without_cls():
    model, inputs = tiny.build("siglip"), tiny.ragged()
    seen = entering(model, 1)
    with torch.no_grad(), vtprune.wrap(model, SAISA):
        model(**inputs)
        tower = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True)
    wanted = projected(made(1).maker, tower.hidden_states[-2].flatten(0, 1))
    torch.testing.assert_close(seen[0][inputs["input_ids"] == tiny.IMAGE], wanted)


@pytest.mark.parametrize("first", ["divprune", "fastv"])
def test_it_follows_the_tokens_that_are_left(first):
    model, inputs = tiny.build(), tiny.ragged()
    seen = entering(model, 3)
    strategies = [first, build("saisa", projectors=PROJECTORS, layers=(3,))]
    with torch.no_grad(), vtprune.wrap(model, strategies, keep=9) as handle:
        model(**inputs)
        tower = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True)
    columns = handle.final
    assert columns is not None
    features = torch.zeros(*inputs["input_ids"].shape, 32)
    features[inputs["input_ids"] == tiny.IMAGE] = tower.hidden_states[-2][:, 1:].flatten(0, 1)
    left = columns.clamp(min=0)
    visual = (inputs["input_ids"].gather(1, left) == tiny.IMAGE) & (columns >= 0)
    assert 0 < int(visual.sum()) <= 27
    own = features.gather(1, left[..., None].expand(-1, -1, 32))[visual]
    torch.testing.assert_close(seen[0][visual], projected(made(3).maker, own))


@pytest.mark.parametrize("first", ["visionzip", "flowcut", "tome"])
def test_what_the_tower_left_is_what_is_made(first):
    model, inputs = tiny.build(), tiny.ragged()
    seen, gone = entering(model, 0), []
    projector = model.model.multi_modal_projector
    projector.register_forward_pre_hook(lambda module, args: gone.append(args[0]))
    with torch.no_grad(), vtprune.wrap(model, [first, SAISA], keep=9) as handle:
        model(**inputs)
    slots = torch.cat([s.slots[0] + i * tiny.N for i, s in enumerate(handle.selections)])
    merged = gone[0].flatten(0, 1)[slots]
    assert 0 < len(slots) <= 27
    assert handle._decoding is not None
    visual = handle._decoding.visual
    torch.testing.assert_close(seen[0][visual], projected(made(0).maker, merged))


def test_beams_and_prompts_without_images():
    inputs = tiny.batch(tiny.prompt(2, 40, 0, seed=5), tiny.prompt(3, 4, 1, seed=6))
    assert_by_definition(tiny.build(), inputs, SAISA)
    # An image each: with several, transformers 5.18 mixes them up.
    model = tiny.build()
    inputs = tiny.batch(tiny.prompt(2, 9, 1, seed=5), tiny.prompt(3, 4, 1, seed=6))
    seen = entering(model, 2)
    with torch.no_grad(), vtprune.wrap(model, SAISA):
        model(**inputs)
        model.generate(**inputs, max_new_tokens=1, do_sample=False, num_beams=3)
    plain, beams = seen[:2]
    torch.testing.assert_close(beams, plain.repeat_interleave(3, dim=0))


def test_gradients_reach_the_projectors_alone():
    model, inputs = tiny.build().requires_grad_(False), tiny.ragged()
    projectors = random_projectors().requires_grad_()
    with vtprune.wrap(model, "saisa", projectors=projectors):
        model(**inputs).logits[:, -1].logsumexp(-1).sum().backward()
    slopes = [p.grad for p in projectors.parameters()]
    assert all(slope is not None and slope.abs().max() > 0 for slope in slopes)
    first = projectors.of(2).linear_2.weight
    assert first.grad is not None
    logits, step = [], 1e-2
    with torch.no_grad():
        for move in (step, -2 * step):
            first[3, 5] += move
            with vtprune.wrap(model, "saisa", projectors=projectors):
                logits.append(model(**inputs).logits[:, -1].double().logsumexp(-1).sum())
    slope = float(logits[0] - logits[1]) / (2 * step)
    assert slope == pytest.approx(float(first.grad[3, 5]), rel=2e-2)


def test_what_it_costs_is_counted():
    model, inputs = tiny.build(), tiny.one_image()
    with vtprune.wrap(model, SAISA) as handle:
        model(**inputs)
        rules = said(handle)
    with vtprune.wrap(model, "shortv", layers=(0, 1, 2, 3)) as handle:
        model(**inputs)
        frozen = said(handle)
    text, n = model.config.text_config, tiny.N
    d, m, rows = text.hidden_size, text.intermediate_size, inputs["input_ids"].shape[1]
    whole = n * (4 * d**2 + 2 * n * d + 3 * d * m)
    projector = n * (32 * 48 + 48 * 32)
    assert rules.published - frozen.published == pytest.approx(projector / whole)
    full = rows * (3 * d**2 + 3 * d * m + 2 * rows * d)  # 2 of 4 heads have keys and values
    assert rules.realised - frozen.realised == pytest.approx(projector / full)
    assert "no attention, no MLP, made of Patches(2) by a projector" in rules.layers


def test_half_precision():
    model, inputs = tiny.build().to(torch.bfloat16), tiny.ragged()
    inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
    with vtprune.wrap(model, SAISA):
        logits = model(**inputs).logits
    assert logits.dtype == torch.bfloat16
    assert logits[inputs["attention_mask"].bool()].isfinite().all()


def test_a_model_of_other_widths():
    wide = build("saisa", projectors=random_projectors(width=40))
    model = tiny.build()
    with (
        vtprune.wrap(model, wide),
        pytest.raises(InputError, match=r"make 40 values of 32, but .* tower of 32 and .* of 32"),
    ):
        model(**tiny.one_image())


# -- faults that must be noticed -------------------------------------------------------------------


def goes_red(strategy: Any = SAISA) -> None:
    with pytest.raises(AssertionError):
        assert_by_definition(tiny.build(), tiny.ragged(), strategy)


def test_features_of_other_tokens(monkeypatch):
    right = Decoding.of.__func__

    def wrong(cls, prompt, visual, items, features):
        other = {need: [x.roll(1, 0) for x in each] for need, each in features.items()}
        return right(cls, prompt, visual, items, other)

    monkeypatch.setattr(Decoding, "of", classmethod(wrong))
    goes_red()


def test_features_of_other_images(monkeypatch):
    right = encoder._Run.carried
    monkeypatch.setattr(encoder._Run, "carried", lambda self, need: right(self, need)[::-1])
    goes_red()


def test_a_block_off():
    goes_red(Given(given=RowRule("none", 0.0, maker=Projected(0, Patches(1), PROJECTORS))))


def test_a_projector_of_another_layer():
    model = tiny.build()
    with vtprune.wrap(model, SAISA) as handle:
        _, logits = generate(model, tiny.ragged())
        rules = rules_of(handle)
    others = {n: made((n + 1) % 4, attend="none", mlp=0.0) for n in rules}
    wrong = reference(model, tiny.ragged(), others)[1]
    assert (logits - wrong).abs().max() > 1e-3


def test_tokens_that_are_not_made(monkeypatch):
    monkeypatch.setattr(
        computing.Computing, "_made", lambda self, number: lambda module, args, kwargs: None
    )
    goes_red()
