"""Stages inside the language model that make tokens of several, or put them in an order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import vtprune
from tests import tiny
from tests.engine.test_inside import Watching, assert_hides_only
from vtprune import selection as selections
from vtprune.types import (
    Facts,
    KeyNorm,
    LastRow,
    Mix,
    Positions,
    Selection,
    Signals,
    Site,
    Stage,
    Strategy,
)


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


@dataclass(frozen=True)
class Turning(Merging):
    """Keeps the first tokens, the last of them first."""

    positions: ClassVar[Positions] = "renumber"

    def select(self, signals: Signals, k: int) -> Selection:
        rows = torch.arange(k).flip(0).expand(len(signals.tokens), k)
        return Selection(rows, signals.n)


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


def test_outputs_out_of_order_turn_the_oracle_red(monkeypatch):
    right = Selection.apply
    monkeypatch.setattr(Selection, "apply", lambda self, x: right(self, x).flip(1))
    with pytest.raises(AssertionError):
        assert_hides_only(tiny.build(), tiny.ragged(), "sparsevlm", "renumber", 0.5)


@pytest.mark.parametrize("policy", ["keep", "renumber"])
def test_merging_without_weights_turns_the_oracle_red(policy, monkeypatch):
    right = selections.segment_merge

    def wrong(x, source, target, weight, n_segments):
        return right(x, source, target, torch.ones_like(weight), n_segments)

    monkeypatch.setattr(selections, "segment_merge", wrong)
    with pytest.raises(AssertionError):
        assert_hides_only(tiny.build(), tiny.ragged(), "sparsevlm", policy, 0.5)


def test_what_was_read_follows_tokens_that_change_places():
    """The second strategy reads a layer before the first one's, whose outputs are in its order."""
    inputs, watching = tiny.one_image(), Watching(layers=(3,))
    first = Turning(layers=(2,))
    with vtprune.wrap(tiny.build(), [first, watching], keep=[5, 4]) as handle:
        handle.model(**inputs)
        assert handle._decoding is not None
    eager = tiny.build(attention="eager")
    keys = eager(**inputs, output_hidden_states=True).past_key_values.layers[1].keys
    wanted = keys.abs().sum((1, 3))[0, (inputs["input_ids"] == tiny.IMAGE)[0]]
    (signals,) = watching.seen
    torch.testing.assert_close(signals.stack(KeyNorm)[-1][0], wanted[[4, 3, 2, 1, 0]])
