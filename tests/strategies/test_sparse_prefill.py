"""PSA and FlexPrefill in a model: equal to what their definitions make of eager ones."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

import vtprune
from tests import tiny
from tests.engine.test_computing import said
from tests.probes import generate
from tests.strategies.test_interventions import STEPS, equal_by_definition
from vtprune.registry import build
from vtprune.scoring.flexprefill import blocks_seen
from vtprune.strategies.flexprefill import FlexPrefill
from vtprune.strategies.psa import PSA

pytestmark = pytest.mark.slow


def by_levels(inputs: Any, levels_of: Any, block: int) -> Any:
    """By hand: each prompt alone over its keys and their means, which count for all they are of."""
    mask = inputs["attention_mask"].bool()

    def whole(number: int, q: Tensor, k: Tensor, v: Tensor, scores: Tensor) -> Tensor:
        out = scores.softmax(-1) @ v
        for b, valid in enumerate(mask):
            spots = valid.nonzero()[:, 0]
            ids = inputs["input_ids"][b, spots]
            visual = (ids == tiny.IMAGE).nonzero()[:, 0]
            n, after = len(spots), len(spots) - 1 - int(visual[-1])
            queries, keys, values = (x[b : b + 1, :, spots] for x in (q, k, v))
            levels = levels_of(queries, keys, None, after)
            for h, i in product(range(q.shape[1]), range(-(-n // block))):
                end, found = min(n, (i + 1) * block), []
                for j in range(i + 1):
                    level = int(levels[0, h, i, j])
                    starts = range(j * block, (j + 1) * block, level) if level else ()
                    found += [(at, at + level) for at in starts if at + level <= end]
                key, mean = (
                    torch.stack([x[0, h, first:last].mean(0) for first, last in found])
                    for x in (keys, values)
                )
                counts = torch.tensor([last - first for first, last in found])
                logits = queries[0, h, i * block : end] @ key.T * q.shape[3] ** -0.5 + counts.log()
                place = torch.arange(i * block, end)[:, None]
                later = torch.tensor([last for _, last in found]) > place + 1
                out[b, h, spots[i * block : end]] = (
                    logits.masked_fill(later, -1e30).softmax(1) @ mean
                )
        return out

    return whole


SPARSE = {
    "psa": PSA(bounds=(0.3, 0.5, 0.7, 0.9), block=8, stride=4, alike=False, text=0),
    "flexprefill": FlexPrefill(gamma=0.3, block=8, min_budget=8),
}


def levels_by(strategy: Any) -> Any:
    if isinstance(strategy, PSA):
        return strategy.levels
    return lambda q, k, scale, after: blocks_seen(q, k, 8, strategy.gamma, strategy.tau, 1).long()


@pytest.mark.parametrize("name", SPARSE)
def test_sparse_prefill_equals_attention_over_means(name):
    inputs = tiny.ragged()
    report = equal_by_definition(
        inputs, SPARSE[name], whole=by_levels(inputs, levels_by(SPARSE[name]), 8)
    )
    shares = report.rules.densities
    assert set(shares) == {0, 1, 2, 3}
    assert all(0 < share < 1 for share in shares.values())
    assert "of attention in 4 layers" in str(report)


def test_with_all_blocks_whole_attention_is_as_ever():
    model, inputs = tiny.build(), tiny.ragged()
    plain = model(**inputs).logits
    there = inputs["attention_mask"].bool()
    every = PSA(bounds=(1.0, 1.0, 1.0, 1.0), block=8, stride=4, alike=False, text=0)
    with vtprune.wrap(model, every) as handle:
        made = model(**inputs).logits
        assert set(said(handle).densities.values()) == {1.0}
    assert (made - plain)[there].abs().max() < 1e-4
    assert not torch.equal(made, plain)
    for name in SPARSE:  # too short for any block to be left out
        with vtprune.wrap(model, name) as handle:
            assert torch.equal(model(**inputs).logits, plain)
            assert set(said(handle).densities.values()) == {1.0}


@pytest.mark.parametrize("first", ["divprune", "fastv"])
@pytest.mark.parametrize("name", SPARSE)
def test_sparse_prefill_behind_pruning_row_by_row(name, first):
    """A row of a padded batch is as it is alone, where tokens left before."""
    model, inputs = tiny.build(), tiny.ragged()
    one = {k: v[:1] for k, v in inputs.items()}
    one["pixel_values"] = inputs["pixel_values"][:1]
    there = one["attention_mask"][0].bool()
    one["input_ids"], one["attention_mask"] = (
        one[k][:, there] for k in ("input_ids", "attention_mask")
    )
    with vtprune.wrap(model, [build(first), SPARSE[name]], keep=30) as handle:
        both = generate(model, inputs, STEPS)[1]
        assert all(share < 1 for share in list(said(handle).densities.values())[2:])
        assert (both[:1] - generate(model, one, STEPS)[1]).abs().max() < 1e-4
