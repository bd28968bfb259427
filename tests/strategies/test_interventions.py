"""VAR, PAINT and rescaled attention in a model: equal to eager ones edited by definition."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import vtprune
from tests import tiny
from tests.engine.edits_reference import changed, greedy
from tests.engine.test_computing import BATCHES
from tests.engine.test_intervening import decoder, rows_of
from tests.probes import generate
from tests.strategies.test_compute import facts_of
from vtprune.errors import ConfigError, UnsupportedError
from vtprune.interventions import Entering
from vtprune.registry import build
from vtprune.scoring.sinks import find_sinks, known_dims, threshold
from vtprune.types import ClsRow, TowerNeed

STEPS = 3


def equal_by_definition(inputs: Any, strategy: Any, attention: str = "sdpa", **change: Any) -> Any:
    """Asserts that a wrapped model makes what the changed eager one does; not what a plain one."""
    model, eager = tiny.build(attention=attention), tiny.build(attention="eager")
    with vtprune.wrap(model, strategy) as handle:
        ids, logits = generate(model, inputs, STEPS)
        report = handle.report()
    with changed(decoder(eager), **change):
        wanted_ids, wanted = greedy(eager, inputs, STEPS)
    assert torch.equal(ids, wanted_ids)
    assert (logits - wanted).abs().max() < 1e-4
    assert (logits - generate(eager, inputs, STEPS)[1]).abs().amax((1, 2)).min() > 1e-3
    return report


# -- VAR -------------------------------------------------------------------------------------------


def redistributed(
    inputs: Any, layers: Any, dims: Any, tau: float, part: float, images: Any = None
) -> Any:
    """By hand, token by token; dims None = those in which the first token is large."""
    length = inputs["input_ids"].shape[1]
    images = inputs["input_ids"] == tiny.IMAGE if images is None else images

    def large(x: Tensor) -> Tensor:
        return x.abs() / (x.pow(2).mean() + 1e-6).sqrt() > tau

    def change(number: int, shares: Tensor, entered: Tensor) -> Tensor:
        shares = shares.clone()
        for b, rows in enumerate(rows_of(inputs, "text", shares.shape[3], images)):
            first = int(inputs["attention_mask"][b].argmax())
            own = list(dims) if dims else large(entered[b, first]).nonzero()[:, 0].tolist()
            sinks = [j for j in range(first, length) if bool(large(entered[b, j])[own].any())]
            visual = images[b].nonzero()[:, 0].tolist()
            others = [j for j in visual if j not in sinks]
            if number not in layers or len(others) == len(visual):
                continue
            for h in range(shares.shape[1]):
                for i in rows:
                    row = shares[b, h, i]
                    if row[visual].sum() < 0.2 or row[others].sum() < 0.5 * row[visual].sum():
                        continue
                    moved = part * row[sinks].sum()
                    row[others] += moved * row[others] / row[others].sum()
                    row[sinks] *= 1 - part
        return shares

    return change


@pytest.mark.parametrize("shape", ["ragged", pytest.param("one", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("options", "layers", "dims", "part"),
    [
        ({"dims": (3, 11), "tau": 1.5}, (2,), (3, 11), 0.6),
        ({"dims": [3, 11], "tau": 1.5, "compat": True}, (2, 3), (3, 11), 0.4),
        ({"tau": 2.0, "moved_fraction": 1.0, "layers": (1, 3)}, (1, 3), None, 1.0),
    ],
)
def test_var_moves_attention_from_sinks_to_the_image(shape, options, layers, dims, part):
    inputs = BATCHES[shape]()
    by_hand = redistributed(inputs, layers, dims, options["tau"], part)
    equal_by_definition(inputs, build("var", **options), weights=by_hand)


def test_var_leaves_a_model_without_sinks_alone():
    model, inputs = tiny.build(), tiny.ragged()
    plain = generate(model, inputs, STEPS)
    with vtprune.wrap(model, build("var", tau=1000.0)):
        made = generate(model, inputs, STEPS)
    assert all(torch.equal(x, y) for x, y in zip(plain, made, strict=True))


def test_var_layers_and_dims_of_models():
    facts = facts_of(32, "LLaVA-1.5 (clip_vision_model)")
    assert build("var").used_layers(facts) == tuple(range(2, 31))
    assert build("var", compat=True).used_layers(facts) == tuple(range(2, 32))
    wide = {32: 4096, 40: 5120}
    found = {
        n: known_dims(replace(facts, decoder_layers=n, decoder_width=w)) for n, w in wide.items()
    }
    assert found == {32: (1415, 2533), 40: (2100, 4743)}
    assert known_dims(facts) is None
    qwen = replace(facts, family="Qwen2-VL", decoder_layers=28, decoder_width=1536)
    assert known_dims(qwen) == (1073, 534, 940)
    var: Any = build("var")
    rule = var.rule(5, replace(facts, decoder_width=4096))
    assert rule.editor.dims == (1415, 2533)
    rule = var.rule(5, qwen)
    assert rule.editor.dims == (1073, 534, 940)
    with pytest.raises(ConfigError, match=r"dims=\(40,\): the hidden states of .* 0 to 31"):
        vtprune.wrap(tiny.build(), build("var", dims=(40,)))


def test_the_first_token_says_in_which_dims_sinks_are():
    hidden = torch.ones(2, 4, 400)
    hidden[:, 0, 7], hidden[:, 2, 7], hidden[:, 3, 9] = 100.0, -80.0, 100.0
    hidden[1, 0] = 1.0
    first = torch.tensor([[True, False, False, False]] * 2)
    assert threshold(400) == 20 * math.sqrt(400 / 4096)
    assert threshold(8192) == 20
    found = find_sinks(hidden, first, None)
    assert found.tolist() == [[True, False, True, False], [False] * 4]
    assert find_sinks(hidden, first, (9,)).tolist() == [[False, False, False, True]] * 2
    assert not find_sinks(hidden, first, (9,), 19.9).any()


def test_act_takes_attention_of_other_sinks_and_hands_it_to_the_rest():
    """As published: all rows of the prompt, the first token no source, sums kept, by hand."""
    inputs, tau = BATCHES["ragged"](), 1.5
    options = {"keys": "sinks", "into": "others", "queries": "all", "decoded": False}
    strategy = build(
        "rescale_attention", factor=0.25, dims=(3, 11), tau=tau, layers=(2,), **options
    )
    length = inputs["input_ids"].shape[1]

    def change(number: int, shares: Tensor, entered: Tensor) -> Tensor:
        shares = shares.clone()
        for b in range(len(shares) if number == 2 else 0):
            first = int(inputs["attention_mask"][b].argmax())
            size = entered[b].pow(2).mean(-1, keepdim=True).sqrt()
            large = (entered[b].abs() / size)[:, [3, 11]].amax(-1) > tau
            sinks = [j for j in range(first + 1, length) if large[j]]
            others = [j for j in range(shares.shape[3]) if j not in sinks]
            for i in range(first, length):
                lost = 0.75 * shares[b, :, i, sinks].sum(-1, keepdim=True)
                rest = shares[b, :, i, others]
                shares[b, :, i, sinks] *= 0.25
                shares[b, :, i, others] = rest * (1 + lost / rest.sum(-1, keepdim=True))
        return shares

    equal_by_definition(inputs, strategy, weights=change)


# -- PAINT -----------------------------------------------------------------------------------------


def cls_rows(inputs: Any, block: int) -> Tensor:
    """Attention of CLS to the patches of each image in a block of the tower, ``[I, N]``."""
    tower = tiny.build(attention="eager").model.vision_tower
    return (
        tower(inputs["pixel_values"], output_attentions=True).attentions[block][:, :, 0, 1:].sum(1)
    )


@pytest.mark.parametrize("shape", ["ragged", pytest.param("turned", marks=pytest.mark.slow)])
def test_paint_raises_logits_of_patches(shape):
    inputs = BATCHES[shape]()
    images, n = inputs["input_ids"] == tiny.IMAGE, tiny.N
    early, late = cls_rows(inputs, 0), cls_rows(inputs, 2)
    gains = torch.zeros(len(early), n)
    for image in range(len(early)):
        order = sorted(range(n), key=lambda j: -float(early[image, j]))
        gains[image, order[: n // 4]] = 0.9
        values = sorted(late[image].tolist())
        low, high = (
            values[int(q)] + (q % 1) * (values[int(q) + 1] - values[int(q)])
            for q in (0.25 * (n - 1), 0.75 * (n - 1))
        )
        gains[image, late[image] > high + 1.5 * (high - low)] = 0.4
    assert {round(x, 1) for x in gains.flatten().tolist()} >= {0.0, 0.9}
    gain = torch.zeros(images.shape)
    gain[images] = gains.flatten()

    def change(number: int, scores: Tensor, entered: Tensor) -> Tensor:
        scores = scores.clone()
        for b, rows in enumerate(rows_of(inputs, "last", scores.shape[3])):
            for i in rows if number >= 2 else ():
                part = scores[b, :, i, : gain.shape[1]]
                part += gain[b] * part.abs().where(gain[b] > 0, torch.zeros(()))
        return scores

    equal_by_definition(inputs, build("paint", alpha=0.9, beta=0.4), logits=change)


def test_paint_marks_image_by_image_and_what_stands_out_late_is_of_that_kind():
    late = torch.tensor([[0.0, 0.1, 0.1, 0.1, 9.0, 0.1, 0.1, 0.2, 9.0]])  # of a newline: no patch
    early = torch.tensor([[9.0, 1.0, 3.0, 2.0, 8.0, 2.0, 1.0, 1.0, torch.nan]])
    item = torch.tensor([[-1, 0, 0, 0, 0, 1, 1, 1, 1]])
    every = torch.ones(1, 9, dtype=torch.bool)
    values: dict[TowerNeed, Tensor] = {
        ClsRow(0): early[..., None],
        ClsRow(22): late[..., None],
    }
    entering = Entering(torch.zeros(1, 9, 4), every, item >= 0, ~every, item, values)
    paint: Any = build("paint", top=0.5)
    first, second = paint.mark(entering)
    assert second[0].nonzero()[:, 0].tolist() == [4]
    assert first[0].nonzero()[:, 0].tolist() == [2, 5]  # of 2 and of 1; the other one is late


def test_paint_needs_a_tower_with_cls():
    with pytest.raises(UnsupportedError, match="paint needs ClsRow"):
        vtprune.wrap(tiny.build("siglip"), "paint")


def test_options_out_of_range():
    wrong = [
        ("var", {"rho": 2}, "rho=2 must be a share"),
        ("var", {"dims": ()}, r"dims=\(\): give hidden dimensions"),
        ("var", {"dims": "all"}, "dims='all': give hidden dimensions"),
        ("var", {"tau": 0}, "tau=0 must be a number above 0"),
        ("paint", {"alpha": -1.0}, "alpha=-1.0 must be a number of at least 0"),
        ("paint", {"top": 1.5}, "top=1.5 must be a share"),
        ("rescale_attention", {"factor": -1.0}, "factor=-1.0 must be a number of at least 0"),
        ("rescale_attention", {"factor": (1.0, 2.0)}, "give one for each head"),
        ("rescale_attention", {"keys": "some"}, "keys='some' is unknown"),
        ("rescale_attention", {"into": "some", "factor": 0.5}, "into='some' is unknown"),
        ("rescale_attention", {"into": "others"}, "factor=1.5 above 1 with into='others'"),
        ("rescale_attention", {"queries": "some"}, "queries='some' is unknown"),
        ("rescale_attention", {"heads": (1, 1)}, r"heads=\(1, 1\): give distinct"),
        ("rescale_attention", {"heads": ()}, "edits nothing"),
        ("psa", {"bounds": (0.7, 0.6, 0.9, 0.9)}, "4 shares of 0 to 1 that do not fall"),
        ("psa", {"block": 12}, "block=12 must be a multiple of 8"),
        ("psa", {"stride": 0}, "stride=0 must be a number of tokens"),
        ("psa", {"text": -1}, "text=-1 must be a number of tokens"),
        ("flexprefill", {"gamma": 2}, "gamma=2 must be a share"),
        ("flexprefill", {"block": 12}, "block=12 must be a multiple of 8"),
        ("flexprefill", {"min_budget": 200}, "min_budget=200 must be a multiple of block=128"),
    ]
    for name, options, message in wrong:
        with pytest.raises(ConfigError, match=message):
            build(name, **options)
