"""Windows of a grid, and the best of each, against a plain walk."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.kernel_inputs import normal
from vtprune.errors import InputError
from vtprune.scoring.windows import best_of_each, windows


def test_squares_in_raster_order_and_what_is_over_joins_the_last():
    assert windows(16, (1, 4, 4), 2).view(4, 4).tolist() == [
        [0, 0, 1, 1],
        [0, 0, 1, 1],
        [2, 2, 3, 3],
        [2, 2, 3, 3],
    ]
    assert windows(15, (1, 3, 5), 2).view(3, 5).tolist() == [[0, 0, 1, 1, 1]] * 3
    assert windows(6, (1, 2, 3), 6).tolist() == [0] * 6
    assert windows(12, (2, 2, 3), 2).view(2, 2, 3).tolist() == [[[0] * 3] * 2, [[1] * 3] * 2]
    assert windows(24, (2, 3, 4), 2).view(2, 3, 4)[1].tolist() == [[2, 2, 3, 3]] * 3
    assert windows(5, None, 2).tolist() == [0] * 5
    with pytest.raises(InputError, match=r"grid=\(1, 2, 3\) holds 6 tokens, but there are 7"):
        windows(7, (1, 2, 3), 2)


def walk(score, group, limit, most):
    taken, filled = [], {}
    for i in sorted(range(len(score)), key=lambda i: (-score[i], i)):
        if len(taken) < most and filled.get(group[i], 0) < limit:
            filled[group[i]] = filled.get(group[i], 0) + 1
            taken.append(i)
    return sorted(taken)


@pytest.mark.parametrize("limit", [0, 1, 3, 50])
@pytest.mark.parametrize("most", [0, 1, 7, 11, 60])
def test_the_best_of_each_as_one_walks(limit, most):
    score = (normal(3, 60) * 2).round()  # ties
    group = torch.randint(0, 5, (60,), generator=torch.Generator().manual_seed(1))
    found = best_of_each(score, group, limit, most)
    for b in range(3):
        wanted = walk(score[b].tolist(), group.tolist(), limit, most)
        assert found[b].nonzero()[:, 0].tolist() == wanted


def test_nan_is_the_lowest():
    score = torch.tensor([[float("nan"), 1.0, 2.0]])
    assert best_of_each(score, torch.zeros(3).long(), 2, 3).tolist() == [[False, True, True]]
