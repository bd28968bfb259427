"""Sampling by inverse transform against a loop in double precision, and its laws."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vtprune.scoring.sampling import cumulated, nearest, sampled


def by_loops(scores: Tensor, n_points: int, crop: bool = False) -> list[int]:
    """The tokens of one image that some point is nearest to, by their index."""
    order = sorted(range(len(scores)), key=lambda i: float(scores[i]))
    total, sums = 0.0, list[float]()
    for i in order:
        total += float(scores[i])
        sums.append(total)
    sums = [(s - sums[0]) / (sums[-1] - sums[0]) for s in sums]
    start = min(s for s in sums if s > 0)
    first = max(0, len(sums) - n_points) if crop else 0
    picked: set[int] = set()
    for step in range(n_points):
        point = start + (1 - start) * step / (n_points - 1)
        at = min(range(first, len(sums)), key=lambda i: abs(point - sums[i]))
        picked.add(order[at])
    return sorted(picked)


def drawn(n: int, seed: int = 0) -> Tensor:
    return torch.randn(3, n, generator=torch.Generator().manual_seed(seed)).mul(2).exp()


@pytest.mark.parametrize(("n", "n_points"), [(20, 20), (20, 7), (50, 12), (50, 90), (3, 2)])
@pytest.mark.parametrize("crop", [False, True])
def test_the_nearest_of_even_points(n: int, n_points: int, crop: bool) -> None:
    scores = drawn(n)
    found = sampled(scores, n, n_points, crop)
    for row, picked in zip(scores.double(), found, strict=True):
        assert picked.nonzero()[:, 0].tolist() == by_loops(row, n_points, crop)


def test_a_crop_shuts_the_lowest_out() -> None:
    scores = torch.linspace(1, 2, 40)[None]
    assert int(sampled(scores, 40, 10)[0].nonzero().min()) < 5
    assert int(sampled(scores, 40, 10, crop=True)[0].nonzero().min()) >= 30


@pytest.mark.parametrize("most", [1, 2, 5, 11, 30])
def test_the_finest_grid_that_samples_no_more_and_the_same_again(most: int) -> None:
    scores = drawn(60)
    found = sampled(scores, most, 25)
    for b, count in enumerate(found.sum(1).tolist()):
        assert count <= most
        fits = [m for m in range(2, 26) if len(by_loops(scores[b].double(), m)) <= most]
        assert found[b].nonzero()[:, 0].tolist() == (
            by_loops(scores[b].double(), max(fits)) if fits else []
        )
        again = sampled(scores[b : b + 1], max(1, count), 25)
        assert count == 0 or torch.equal(again[0], found[b])


def test_where_few_hold_most_few_stay() -> None:
    even, peaked = torch.ones(1, 64), torch.ones(1, 64)
    peaked[0, :4] = 1000.0
    assert int(sampled(peaked, 64, 64).sum()) < 8 < int(sampled(even, 64, 64).sum())


def test_broken_and_empty_scores() -> None:
    scores = drawn(12)
    scores[0, 3], scores[1] = float("nan"), 0.0
    scores[2, :11] = 0.0
    found = sampled(scores, 12, 12)
    assert not found[0, 3]
    assert int(found[1].sum()) > 8
    assert found[2].nonzero().tolist() == [[11]]
    assert sampled(torch.ones(1, 1), 1, 4).tolist() == [[True]]


def test_equal_sums_are_taken_at_the_first() -> None:
    order, sums = cumulated(torch.tensor([[4.0, 0.0, 0.0, 1.0]]))
    assert order.tolist() == [[1, 2, 3, 0]]
    torch.testing.assert_close(sums, torch.tensor([[0.0, 0.0, 0.2, 1.0]]))
    assert nearest(torch.tensor([[0.0, 1.0, 1.0]]), 2).tolist() == [[False, True, False]]
