"""Oracle 3 inside the language model, for what is read of each text token, head or dimension."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import vtprune
from tests.families.eager import decoder_calls, inputs_of, model_of
from tests.families.test_signals import FAMILIES, close, placeholders
from vtprune.engine import rows, states
from vtprune.engine.plan import find_adapter
from vtprune.types import (
    EachHead,
    EachText,
    Facts,
    LayerKeys,
    Likeness,
    Quantity,
    Signals,
    Site,
    Stage,
    Strategy,
    TextPeak,
    Turned,
)

KIND = "ragged"


@dataclass(frozen=True)
class Reading(Strategy):
    """Notes what it is given of the layer before the one it acts before."""

    at: int
    seen: list[Signals] = field(default_factory=list, hash=False)
    acts_inside: ClassVar[bool] = True

    def plan(self, facts: Facts) -> tuple[Stage, ...]:
        each = [kind(self.at - 1) for kind in (EachText, EachHead, LayerKeys, TextPeak, Turned)]
        return (Stage(Site.DECODER, (*each, Likeness(0)), self.at),)

    def score(self, signals: Signals) -> Tensor:
        self.seen.append(signals)
        return signals.tokens.norm(dim=-1)


def expected(family: str, layer: int) -> dict[Quantity, list[Tensor]]:
    """Returns per row of the batch what is known of each column, by definition."""
    visual = placeholders(family, KIND)
    valid = inputs_of(family, KIND)["attention_mask"].bool()
    module, (q, k, _, probabilities) = decoder_calls(family, KIND)[layer]
    _, (cos, sin) = entering(family, layer)
    embeds, _ = entering(family, 0)
    ones = torch.ones(len(q), 1, *q.shape[2:])
    turned, _ = sys.modules[type(module).__module__].apply_rotary_pos_emb(ones, ones, cos, sin)
    found: dict[Quantity, list[Tensor]] = {
        LayerKeys(layer): list(k.mean(1)),
        Turned(layer): list(turned[:, 0]),
    }
    for b, seen in enumerate(visual):
        last = max(seen.nonzero().flatten().tolist(), default=-1)
        after = [i for i in range(last + 1, len(seen)) if valid[b, i]]
        per_head = probabilities[b][:, after].permute(2, 1, 0)
        products = embeds[b][seen] @ embeds[b][after].T
        likeness = torch.zeros(seen.shape)
        likeness[after] = (products.exp() / products.exp().sum(1, keepdim=True)).mean(0)
        found.setdefault(EachHead(layer), []).append(per_head)
        found.setdefault(EachText(layer), []).append(per_head.mean(2))
        found.setdefault(TextPeak(layer), []).append(per_head.amax((1, 2)))
        found.setdefault(Likeness(0), []).append(likeness)
    return found


@torch.no_grad()
def entering(family: str, layer: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Returns the hidden states and the rotary embeddings that a layer is called with."""
    model = model_of(family, "eager")[0]
    seen: list[Any] = []
    hook = (
        find_adapter(model)
        .decoder[layer]
        .register_forward_pre_hook(
            lambda module, args, kwargs: seen.append((args[0], kwargs["position_embeddings"])),
            with_kwargs=True,
        )
    )
    model(**inputs_of(family, KIND))
    hook.remove()
    return seen[0]


def check(family: str, attention: str = "sdpa") -> None:
    """Holds what is read of the layer before the last against the eager copy."""
    model, visual = model_of(family, attention)[0], placeholders(family, KIND)
    at = find_adapter(model).facts.decoder_layers - 1
    strategy, wanted = Reading(at), expected(family, at - 1)
    with vtprune.wrap(model, strategy, keep=0.4):
        model(**inputs_of(family, KIND))
    left = [b for b in range(len(visual)) if visual[b].any()]
    for signals in strategy.seen:
        assert signals.inside is not None and signals.item is not None
        for row, (i, after) in enumerate(
            zip(signals.item.tolist(), signals.inside.after, strict=True)
        ):
            b = left[i]
            last = int(visual[b].nonzero()[-1])
            for need, value in signals.values.items():
                full = wanted[need][b]
                assert close(_whole(value[row], full), full[visual[b]]), need
                if not isinstance(need, (EachText, TextPeak)):
                    assert close(after[need], full[last + 1 :]), need


def _whole(value: Tensor, full: Tensor) -> Tensor:
    """Cuts off what pads a row that has fewer text tokens; it is 0."""
    if value.shape == full.shape or value.ndim < 2:
        return value
    assert not value[:, full.shape[1] :].any()
    return value[:, : full.shape[1]]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_read_of_each_equals_eager(family, attention):
    check(family, attention)


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_out_of_order_are_noticed(family, monkeypatch):
    right = rows._heads

    def wrong(q: Tensor, k: Tensor, *args: Any) -> Tensor:
        return right(q, k.flip(0), *args)

    monkeypatch.setattr(rows, "_heads", wrong)
    with pytest.raises(AssertionError):
        check(family)


@pytest.mark.parametrize(
    ("need", "change"),
    [
        (Likeness, lambda value: value.roll(1, 1)),
        (Turned, lambda value: value.flip(-1)),
    ],
)
def test_a_wrong_reading_is_noticed(need, change, monkeypatch):
    right = states.STATES[need]
    monkeypatch.setitem(states.STATES, need, lambda *args: change(right(*args)))
    with pytest.raises(AssertionError):
        check("llava")
