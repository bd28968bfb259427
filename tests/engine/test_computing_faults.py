"""Faults of the engine of row rules that must be noticed."""

from __future__ import annotations

import pytest

import vtprune
from tests import tiny
from tests.engine.rules_reference import reference
from tests.engine.test_computing import BATCHES, RULES, Given, assert_by_definition
from tests.probes import generate
from vtprune.engine import computing, split


def goes_red(patch, where, name, fault, rule="frozen", shape="ragged", **options):
    """Holds that the oracle is red with the fault in place."""
    patch.setattr(where, name, fault)
    with pytest.raises(AssertionError):
        strategy = Given(given=RULES[rule])
        assert_by_definition(tiny.build(), BATCHES[shape](), strategy, **options)


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}])
def test_a_missing_mask(options, monkeypatch):
    """Of more keys than queries sdpa then takes the first ones, as many as there are queries."""
    fault = (split.Split, "mask", lambda self, mask: None, "not attending", "one")
    goes_red(monkeypatch, *fault, **options)


def test_rows_of_the_mask_that_belong_to_other_queries(monkeypatch):
    right = split.Split.mask
    goes_red(monkeypatch, split.Split, "mask", lambda self, mask: right(self, mask).roll(1, 2))


def test_answers_in_other_rows(monkeypatch):
    right = split.Split.answers
    goes_red(monkeypatch, split.Split, "answers", lambda self, out: right(self, out).roll(1, 1))


def test_padding_among_the_queries_that_is_not_taken_out(monkeypatch):
    def wrong(self, out):
        return self.scatter(out.flatten(0, 1)[: len(self.real)][None])

    goes_red(monkeypatch, split.Split, "answers", wrong, shape="turned")


def test_rules_one_layer_off(monkeypatch):
    right = computing.Computing.__init__

    def wrong(self, layers, rules, current):
        right(self, layers, {number + 1: rule for number, rule in rules.items()}, current)

    model, strategy = tiny.build(), Given(given=RULES["frozen"], layers=(1,))
    monkeypatch.setattr(computing.Computing, "__init__", wrong)
    with vtprune.wrap(model, strategy):
        _, logits = generate(model, tiny.ragged())
    wanted = reference(model, tiny.ragged(), {1: RULES["frozen"]})[1]
    assert (logits - wanted).abs().max() > 1e-3


def test_rules_while_tokens_are_decoded(monkeypatch):
    """What comes after the prompt has other rows than its split says."""
    right = computing.Computing._split

    def wrong(self, number, device):
        decoding = self.current()
        was, decoding.prefilled = decoding.prefilled, False
        try:
            return right(self, number, device)
        finally:
            decoding.prefilled = was

    monkeypatch.setattr(computing.Computing, "_split", wrong)
    with pytest.raises(IndexError, match="out of bounds"):
        assert_by_definition(tiny.build(), tiny.one_image(), Given(given=RULES["no MLP"]))


@pytest.mark.parametrize("rule", ["neighbours", "all at once"])
def test_a_wider_window(rule, monkeypatch):
    right = computing.near
    goes_red(monkeypatch, computing, "near", lambda where, r: right(where, r + 1), rule)


def test_a_window_across_images(monkeypatch):
    from vtprune.engine import decoding

    right = decoding.places

    def one_image(ids, items):
        where = right(ids, items).clone()
        where[..., 0] = where[..., 0].clamp(max=0)
        return where

    goes_red(monkeypatch, decoding, "places", one_image, "neighbours")


def test_other_neurons(monkeypatch):
    right = computing.thin
    goes_red(monkeypatch, computing, "thin", lambda mlp, s: right(mlp, s / 2), "half an MLP")


def test_values_of_other_heads(monkeypatch):
    right = computing.Computing._drop_heads

    def wrong(self, undo, number, heads):
        right(self, undo, number, [1 - head for head in heads])

    goes_red(monkeypatch, computing.Computing, "_drop_heads", wrong, "one head")
