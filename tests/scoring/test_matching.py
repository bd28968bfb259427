"""Matching of the two halves of a sequence, by hand and by its laws."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vtprune.scoring.matching import (
    ascending,
    averaged,
    closest,
    halves,
    match,
    merge_down,
    n_staying,
)


def at_angles(*degrees: float) -> torch.Tensor:
    """Vectors of different lengths at these angles, ``[1, N, 2]``."""
    angle = torch.tensor(degrees).deg2rad()
    length = 1.0 + torch.arange(len(degrees))
    return (length[:, None] * torch.stack([angle.cos(), angle.sin()], dim=1))[None]


@pytest.mark.parametrize(
    ("n", "n_prefix", "even", "odd"),
    [
        (5, 0, [0, 2, 4], [1, 3]),
        (5, 1, [1, 3], [0, 2, 4]),  # [CLS] takes the first even place
        (4, 2, [0, 2], [1, 3]),
        (2, 1, [1], [0]),
    ],
)
def test_halves_are_those_of_the_whole_sequence(n, n_prefix, even, odd):
    assert [x.tolist() for x in halves(n, n_prefix)] == [even, odd]


def test_closest_by_hand():
    nan = float("nan")
    similarity = torch.tensor([[[0.1, 0.5], [0.9, 0.9], [0.5, 0.2], [nan, 0.4]]])
    source, partner = closest(similarity, 2)  # of equal ones the lower, as partner and as row
    assert source.tolist() == [[0, 1]]
    assert partner.tolist() == [[1, 0]]
    assert closest(similarity, 4)[1].tolist() == [[1, 0, 0, 1]]


def test_match_by_hand():
    # Even places 0, 2, 4 at 0, 50, 90 degrees; odd ones 1, 3 at 10 and 80. Cosine, not product.
    metric = at_angles(0, 10, 50, 80, 90)
    rows, into = match(metric, 1)
    assert rows.tolist() == [[2, 4, 1, 3]]
    assert into.tolist() == [[2, 2, 0, 3, 1]]
    rows, into = match(metric, 2)
    assert rows.tolist() == [[2, 1, 3]]
    assert into.tolist() == [[1, 1, 0, 2, 2]]


def test_match_behind_a_prefix_by_hand():
    # Now 1 and 3 look for one of 0, 2, 4: 1 is 10 degrees from 0, 3 is 10 from 4.
    rows, into = match(at_angles(0, 10, 50, 80, 91), 1, n_prefix=1)
    assert rows.tolist() == [[3, 0, 2, 4]]
    assert into.tolist() == [[1, 1, 2, 0, 3]]


def test_broken_tokens_resemble_none():
    metric = at_angles(0, 0, 5, 5, 10, 10)
    metric[0, 0] = float("nan")
    metric[0, 3] = float("inf")
    rows, into = match(metric, 2)
    assert rows.tolist() == [[0, 1, 3, 5]]
    assert into.tolist() == [[0, 1, 1, 2, 3, 3]]


def test_a_mean_is_weighted_by_size():
    rows, into = torch.tensor([[2, 1]]), torch.tensor([[1, 1, 0]])
    size = torch.tensor([[3.0, 1.0, 5.0]])
    selection = averaged(rows, into, size)
    x = torch.tensor([[[8.0], [4.0], [1.0]]])
    assert selection.apply(x).tolist() == [[[1.0], [7.0]]]
    assert selection.total(size).tolist() == [[5.0, 4.0]]


def test_outputs_in_the_order_of_their_places():
    rows, into = ascending(torch.tensor([[2, 4, 1, 3]]), torch.tensor([[2, 2, 0, 3, 1]]))
    assert rows.tolist() == [[1, 2, 3, 4]]
    assert into.tolist() == [[0, 0, 1, 2, 3]]


def test_repeated_matching_is_that_of_several_rounds():
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(2, 36, 8, generator=generator)
    size = torch.randint(1, 5, (2, 36), generator=generator).float()
    once = averaged(*merge_down(keys, size, 9, 1), size)
    first = averaged(*match(keys, 18, 1), size)
    second = averaged(*match(first.apply(keys), 9, 1), first.total(size))
    assert torch.equal(once.rows, first.rows.gather(1, second.rows))
    assert torch.equal(once.total(size), second.total(first.total(size)))
    torch.testing.assert_close(once.apply(keys), second.apply(first.apply(keys)))


@given(st.data())
def test_every_token_goes_into_one_output_that_keeps_its_own_place(data):
    n = data.draw(st.integers(2, 40))
    k, n_prefix = data.draw(st.integers(1, n - 1)), data.draw(st.integers(0, 3))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    metric = torch.randn(2, n, 4, generator=generator)
    size = torch.randint(1, 9, (2, n), generator=generator).float()
    rows, into = merge_down(metric, size, k, n_prefix)
    assert rows.shape == (2, k)
    assert torch.equal(into.gather(1, rows), torch.arange(k).expand(2, k))
    selection = averaged(rows, into, size)
    assert selection.total(size).sum(1).tolist() == size.sum(1).tolist()
    torch.testing.assert_close(selection.apply(torch.ones(2, n, 1)), torch.ones(2, k, 1))


@pytest.mark.parametrize(
    ("entered", "k", "stages", "left"),
    [
        (64, 32, 4, [56, 48, 40, 32]),
        (36, 14, 3, [28, 21, 14]),  # 22 = 8 + 7 + 7
        (36, 5, 3, [20, 10, 5]),  # later stages cannot more than halve
        (36, 1, 3, [4, 2, 1]),  # not even the first: it merges repeatedly
        (10, 10, 3, [10, 10, 10]),
        (10, 9, 3, [9, 9, 9]),
    ],
)
def test_how_many_stay(entered, k, stages, left):
    n, found = entered, []
    for stage in range(stages):
        n = n_staying(n, entered, k, stage, stages)
        found.append(n)
    assert found == left


@given(st.integers(1, 700), st.integers(1, 30), st.data())
def test_no_stage_more_than_halves_where_that_is_enough(entered, stages, data):
    k = data.draw(st.integers(1, entered))
    counts = [entered]
    for stage in range(stages):
        counts.append(n_staying(counts[-1], entered, k, stage, stages))
    assert counts[-1] == k
    assert counts == sorted(counts, reverse=True)
    steps = list(itertools.pairwise(counts))
    enough = k << stages >= entered
    assert all(after >= before - before // 2 for before, after in steps[not enough :])
