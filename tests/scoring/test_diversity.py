"""Unit vectors, centers and thinning, by hand and against plain loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vtprune.scoring.diversity import centers_from, least_repeated, unit


def directions(*degrees: float) -> Tensor:
    """Unit vectors of the plane, ``[1, N, 2]``."""
    angle = torch.tensor(degrees).deg2rad()
    return torch.stack([angle.cos(), angle.sin()], dim=1)[None]


def test_unit_vectors_and_what_is_broken():
    tokens = torch.tensor([[[3.0, 4.0], [0.0, 0.0], [float("nan"), 1.0], [float("inf"), 1.0]]])
    x, broken = unit(tokens.to(torch.bfloat16))
    assert x.dtype == torch.float32
    torch.testing.assert_close(x[0], torch.tensor([[0.6, 0.8], [0, 0], [0, 0], [0, 0]]))
    assert broken.tolist() == [[False, False, True, True]]


def test_each_center_is_farthest_from_those_before():
    tokens = directions(0, 10, 90, 100, 200, 275)
    assert centers_from(torch.tensor([0]), tokens, 4).tolist() == [[0, 4, 3, 5]]
    assert centers_from(torch.tensor([3]), tokens, 3).tolist() == [[3, 5, 1]]
    assert centers_from(torch.tensor([3]), tokens, 1).tolist() == [[3]]


def test_equal_tokens_become_centers_by_index_and_broken_ones_last():
    same = torch.randn(1, 1, 8, generator=torch.Generator().manual_seed(0)).expand(2, 6, 8).clone()
    same[1, 1] = float("nan")
    picks = centers_from(torch.tensor([2, 2]), same, 6).tolist()
    assert picks == [[2, 0, 1, 3, 4, 5], [2, 0, 3, 4, 5, 1]]


@pytest.mark.parametrize("seed", range(3))
def test_centers_of_random_tokens(seed):
    tokens = torch.randn(2, 40, 16, generator=torch.Generator().manual_seed(seed))
    picks = centers_from(torch.tensor([5, 7]), tokens, 12)
    for x, row in zip(torch.nn.functional.normalize(tokens, dim=-1), picks.tolist(), strict=True):
        chosen = row[:1]
        while len(chosen) < 12:
            similar = (x @ x[chosen].T).amax(1)
            similar[chosen] = 9.0
            chosen.append(int(similar.argmin()))
        assert chosen == row


def test_the_most_similar_leave_and_the_rest_comes_to_the_front():
    # 0, 2, 4 are compared with 1, 3, 5: 4 is like 5, then 0 is like 1, and 2 is like none.
    tokens = directions(0, 20, 90, 200, 299, 300)
    assert least_repeated(tokens, 5, at_once=1).tolist() == [[0, 2, 1, 3, 5]]
    assert least_repeated(tokens, 4, at_once=2).tolist() == [[2, 1, 3, 5]]
    # Then, of the order 0, 2, 1, 3, 5, those at 0, 20, 300 are compared with those at 90 and 200.
    assert least_repeated(tokens, 4, at_once=1).tolist() == [[0, 5, 2, 3]]


def reference(tokens: Tensor, k: int, at_once: int) -> list[int]:
    x = torch.nn.functional.normalize(tokens, dim=-1)
    left = list(range(len(x)))
    while len(left) > k:
        first, second = left[::2], left[1::2]
        leave = min(at_once, len(left) - k, len(first))
        similar = [max(float(x[i] @ x[j]) for j in second) for i in first]
        order = sorted(range(len(first)), key=lambda i: -similar[i])
        left = [first[i] for i in order[leave:]] + second
    return left


@pytest.mark.parametrize(("n", "k"), [(24, 5), (23, 5), (9, 8), (9, 1), (2, 1), (7, 7), (31, 30)])
def test_thinning_random_tokens(n, k):
    tokens = torch.randn(2, n, 16, generator=torch.Generator().manual_seed(n))
    left = least_repeated(tokens, k).tolist()
    assert left == [reference(row, k, 8) for row in tokens]


def test_nothing_is_left_when_nothing_is_asked_for():
    assert least_repeated(torch.randn(2, 5, 4), 0).shape == (2, 0)


@pytest.mark.parametrize("spoilt", [(0, 2, 4), (1, 3, 5), (17, 18, 19)])
def test_broken_tokens_leave_first(spoilt):
    tokens = torch.randn(1, 20, 8, generator=torch.Generator().manual_seed(0))
    tokens[0, list(spoilt)] = float("nan")
    assert not set(spoilt) & set(least_repeated(tokens, 10)[0].tolist())
    assert len(set(least_repeated(tokens * float("nan"), 10)[0].tolist())) == 10
