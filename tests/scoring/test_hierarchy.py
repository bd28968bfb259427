"""Claims and tiers, by hand on a raster of 2 frames, 2 rows and 3 columns:

0 1 2     6  7  8
3 4 5     9 10 11
"""

from __future__ import annotations

import pytest
import torch

from vtprune.errors import InputError
from vtprune.scoring.hierarchy import claims, neighbours, take

NAN = float("nan")


def test_neighbours_end_at_rows_columns_and_frames() -> None:
    index = torch.tensor([[0, 4, 5, 6, 11]])
    assert neighbours(index, 12, (2, 2, 3)).tolist() == [
        [[12, 1, 12, 3], [3, 5, 1, 12], [4, 12, 2, 12], [12, 7, 12, 9], [10, 12, 8, 12]]
    ]


def test_neighbours_by_flat_index_run_on_and_stop_at_both_ends() -> None:
    index = torch.tensor([[0, 3, 11]])
    assert neighbours(index, 12, (1, 4, 3), wrap=True).tolist() == [
        [[0, 1, 0, 3], [2, 4, 0, 6], [10, 11, 8, 11]]
    ]


@pytest.mark.parametrize("wrap", [False, True])
def test_without_a_grid_nothing_is_near(wrap: bool) -> None:
    assert neighbours(torch.tensor([[3]]), 12, None, wrap=wrap).tolist() == [[[12] * 4]]


def test_a_grid_of_another_size_is_refused() -> None:
    with pytest.raises(InputError, match=r"grid=\(1, 2, 3\) holds 6 tokens, but there are 12"):
        neighbours(torch.tensor([[3]]), 12, (1, 2, 3))


def test_anchors_claim_first_then_what_is_around_them() -> None:
    score = torch.zeros(1, 6)
    score[0, 4], score[0, 0] = 2.0, 1.0
    # anchors 4, 0; around 4: 3 left, 5 right, 1 above; around 0: 1 right (taken), 3 below (taken)
    claim = claims(score, 2, (1, 2, 3))
    assert claim.tolist() == [[1, 4, 10, 2, 0, 3]]


def test_no_anchor_claims_nothing() -> None:
    assert claims(torch.rand(2, 6), 0, (1, 2, 3)).tolist() == [[0] * 6] * 2


def test_rows_claim_for_themselves() -> None:
    score = torch.eye(6)[[0, 5]]
    both = claims(score, 1, (1, 2, 3))
    assert both.tolist() == [[0, 2, 5, 4, 5, 5], [5, 5, 3, 5, 1, 0]]
    assert torch.equal(claims(score[1:], 1, (1, 2, 3)), both[1:])


def test_take_goes_by_claim_then_score_then_index() -> None:
    claim = torch.tensor([[7, 0, 7, 7, 1, 7]])
    score = torch.tensor([[0.1, 0.0, 0.5, NAN, 0.9, 0.5]])
    assert [take(claim, score, k).tolist()[0] for k in range(7)] == [
        [],
        [1],
        [1, 4],
        [1, 2, 4],
        [1, 2, 4, 5],
        [0, 1, 2, 4, 5],
        [0, 1, 2, 3, 4, 5],
    ]
