"""Which entries of a cache matter, and what merging makes of them: as loops say."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.engine.evicting_reference import ByDefinition, smoothed
from vtprune import ConfigError
from vtprune.evicting import Entries
from vtprune.scoring import evicting
from vtprune.scoring.evicting import (
    check_merge,
    column_sums,
    keep_visual,
    merged,
    pooled,
    question,
    window_attention,
)
from vtprune.strategies.lookm import LookM
from vtprune.types import Budget

N, HEADS, SHARED, WIDTH = 23, 6, 3, 8


def entries(seed: int = 0, dtype: torch.dtype = torch.float32, causal: bool = True) -> Entries:
    """Text, 12 visual tokens, text; not causal: visual tokens see each other."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(heads, N, WIDTH, generator=generator).to(dtype)
        for heads in (HEADS, SHARED, SHARED)
    )
    visual = torch.zeros(N, dtype=torch.bool)
    visual[5:17] = True
    seen = torch.ones(N, N, dtype=torch.bool).tril() | (visual & visual[:, None])
    return Entries(q, k, v, visual, 0.4, None if causal else lambda rows: seen[rows])


def probabilities(given: Entries) -> Tensor:
    """Whole maps of attention, ``[Hkv, G, n, n]``."""
    k = given.k.repeat_interleave(HEADS // SHARED, dim=0)
    logits = 0.4 * given.q @ k.mT
    return (
        logits.masked_fill(~given.seen(torch.arange(N)), -torch.inf)
        .softmax(-1)
        .unflatten(0, (SHARED, -1))
    )


@pytest.mark.parametrize("causal", [True, False])
def test_sums_of_columns_are_those_of_the_whole_map(causal, monkeypatch):
    monkeypatch.setattr(evicting, "AT_ONCE", 7)
    given = entries(causal=causal)
    sums = column_sums(given)
    assert torch.allclose(sums, probabilities(given).mean(1).sum(1), atol=1e-5)
    assert torch.allclose(sums.sum(1), torch.full((SHARED,), float(N)))


@pytest.mark.parametrize("causal", [True, False])
def test_a_window_is_the_mean_of_its_rows(causal):
    given = entries(causal=causal)
    rows = torch.tensor([6, 18, 22])
    wanted = probabilities(given)[:, :, rows].mean((1, 2))
    assert torch.allclose(window_attention(given, rows), wanted, atol=1e-6)


@pytest.mark.parametrize(
    ("visual", "wanted"), [([0, 1, 1, 0, 0], [3, 4]), ([0, 0, 1], [2]), ([0, 0, 0], [2])]
)
def test_the_question_comes_after_what_is_seen(visual, wanted):
    assert question(torch.tensor(visual).bool()).tolist() == wanted


def test_neighbours_are_those_in_the_image():
    scores = torch.rand(3, 2 * 12 + 6 + 1, generator=torch.Generator().manual_seed(1))
    grids = [torch.cartesian_prod(torch.arange(3), torch.arange(4)) for _ in range(2)]
    grids.append(torch.tensor([[0, 0], [0, 2], [1, 1], [2, 0], [2, 2], [3, 2]]))  # others left
    where = [
        torch.cat([torch.full((len(g), 1), i), torch.full((len(g), 1), i % 2), g], 1)
        for i, g in enumerate(grids)
    ]
    where.append(torch.full((1, 4), -1))
    places = torch.cat(where).float()
    for side in (1, 3, 5):
        made = pooled(scores, places, side, 5)
        wanted = [
            smoothed(row.tolist(), [tuple(p) for p in places.tolist()], side, 5) for row in scores
        ]
        assert torch.allclose(made, torch.tensor(wanted), atol=1e-6)


@pytest.mark.parametrize("n", [1, 2, 4, 9])
@pytest.mark.parametrize("run", [1, 3, 5])
def test_neighbours_in_order_where_there_is_no_grid(n, run):
    scores = torch.rand(2, n, generator=torch.Generator().manual_seed(n))
    wanted = [smoothed(row.tolist(), None, 3, run) for row in scores]
    assert torch.allclose(pooled(scores, None, 3, run), torch.tensor(wanted), atol=1e-6)


def test_text_stays_and_of_each_head_its_own_best():
    given = entries()
    scores = torch.rand(SHARED, 12, generator=torch.Generator().manual_seed(2))
    kept = keep_visual(given, scores, 4, "none")
    assert kept.k is None
    assert kept.v is None
    for head, row in enumerate(kept.stays):
        best = 5 + scores[head].topk(4).indices
        assert set(row.nonzero()[:, 0].tolist()) == {*range(5), *range(17, N), *best.tolist()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("how", ["values", "pivot", "average", "weighted", "none"])
@pytest.mark.parametrize("k", [0, 1, 5, 11])
def test_merging_is_as_by_definition(how, k, dtype):
    given = entries(3, dtype)
    scores = torch.rand(SHARED, 12, generator=torch.Generator().manual_seed(3))
    stays = keep_visual(given, scores, k, "none").stays
    made = merged(given, stays, how)
    definition = ByDefinition(LookM(merge=how), Budget(tokens=1))
    for head in range(SHARED):
        own, visual = stays[head].nonzero()[:, 0].tolist(), list(range(5, 17))
        wanted = definition.merge(given.k[head].float(), given.v[head].float(), own, visual)
        found = (x if y is None else y for x, y in ((given.k, made.k), (given.v, made.v)))
        for x, y in zip(wanted, found, strict=True):
            assert y.dtype == dtype
            assert torch.allclose(
                x[own], y[head, own].float(), atol=3e-2 if y.itemsize == 2 else 1e-5
            )
    assert (made.v is None) == (how == "none" or (how == "values" and k == 0))
    assert (made.k is None) == (how in ("none", "values"))


def test_all_that_stays_is_untouched():
    given = entries()
    made = merged(given, torch.ones(SHARED, N, dtype=torch.bool), "pivot")
    assert made.k is None
    assert made.v is None


def test_zero_vectors_merge_into_something_finite():
    given = entries()
    blank = Entries(given.q, given.k * 0, given.v * 0, given.visual)
    stays = keep_visual(given, torch.rand(SHARED, 12), 2, "none").stays
    for how in ("values", "pivot", "average", "weighted"):
        made = merged(blank, stays, how)
        assert made.v is not None
        assert made.v.isfinite().all()


def test_another_way_to_merge_is_refused():
    with pytest.raises(ConfigError, match="merge='mean' is unknown; choose one of 'values'"):
        check_merge("mean")
