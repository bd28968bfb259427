"""The cache layer alone: its rows, tokens taken back, and used anew."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import vtprune
from tests import tiny
from tests.engine.test_choosing import probed
from tests.engine.test_held import by_hand
from tests.probes import generate
from vtprune import UnsupportedError
from vtprune.engine.held import Held


def filled(others: str) -> tuple[Held, tuple[Tensor, Tensor]]:
    """The cache of a layer with a tail of 3 tokens, and what it gives with one token more."""
    model, inputs = tiny.build(), tiny.ragged()
    with vtprune.wrap(model, probed(0.5, others, every=4)) as handle:  # type: ignore[arg-type]
        by_hand(model, inputs, torch.full((2, 11), 5))
        layer = handle._decoding.held[2]  # type: ignore[union-attr]
    assert layer.seen == 3
    return layer, given(layer)


def given(layer: Held) -> tuple[Tensor, Tensor]:
    token = torch.ones(len(layer.keys), 2, 1, 8)
    keys, values = layer.update(token, token)
    layer.crop(-1)
    return keys, values


@pytest.mark.parametrize("others", ["drop", "pack"])
def test_rows_of_a_cache(others):
    layer, whole = filled(others)
    index = layer.cut.index
    for name, asked, rows in [
        ("reorder_cache", torch.tensor([1, 0]), [1, 0]),
        ("batch_repeat_interleave", 2, [1, 1, 0, 0]),
        ("batch_select_indices", torch.tensor([1, 3]), [1, 0]),
    ]:
        getattr(layer, name)(asked)
        assert torch.equal(layer.cut.index, index[rows])
        for x, y in zip(given(layer), whole, strict=True):
            assert torch.equal(x, y[rows])


@pytest.mark.parametrize("others", ["drop", "pack"])
def test_tokens_are_taken_back_from_the_tail_alone(others):
    layer, whole = filled(others)
    length = layer.get_seq_length()
    for wrong in (-4, 1):
        with pytest.raises(UnsupportedError, match=r"of this cache the last 3 tokens can be taken"):
            layer.crop(wrong)
    layer.crop(0)
    layer.crop(-2)
    assert (layer.seen, layer.get_seq_length()) == (1, length - 2)
    assert layer.get_mask_sizes(1) == (length - 1, 0)
    for x, y in zip(given(layer), whole, strict=True):
        assert torch.equal(x[:, :, :-1], y[:, :, :-3])


@pytest.mark.parametrize("others", ["drop", "pack"])
def test_a_cache_that_is_used_anew(others):
    model, inputs, strategy = tiny.build(), tiny.ragged(), probed(0.5, others, every=4)
    with vtprune.wrap(model, strategy):
        wanted = generate(model, inputs)[1]
        cache = model(**inputs).past_key_values
        cache.reset()
        assert cache.get_seq_length() == 0
        again = generate(model, inputs, past_key_values=cache)[1]
    assert torch.equal(wanted, again)
