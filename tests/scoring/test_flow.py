"""The running score and the schedule of FlowCut, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from vtprune.scoring.flow import concentration, largest, n_leaving, running

NAN = float("nan")


def test_the_running_score_halves_what_was_before() -> None:
    scores = torch.tensor([[[8.0, 0.0]], [[4.0, 2.0]], [[1.0, 1.0]]])
    # 8 -> (8 + 4) / 2 = 6 -> (6 + 1) / 2 = 3.5; 0 -> 1 -> 1
    assert running(scores).tolist() == [[3.5, 1.0]]
    assert running(scores[:1]).tolist() == [[8.0, 0.0]]
    assert running(scores, decay=0.0).tolist() == [[1.0, 1.0]]


def test_concentration_is_0_of_even_and_1_of_a_single_token() -> None:
    # Two of four, evenly: entropy log 2 of log 4 is 1/2, so 1 - 1/4.
    relation = torch.tensor([[1.0, 1, 1, 1], [0, 3, 0, 0], [2, 0, 2, 0]])
    torch.testing.assert_close(concentration(relation), torch.tensor([0.0, 1.0, 0.75]))


def test_concentration_takes_nan_for_none() -> None:
    relation = torch.tensor([[2.0, NAN, 2.0, 0.0], [NAN] * 4])
    torch.testing.assert_close(concentration(relation), torch.tensor([0.75, 1.0]))


def test_the_nearer_the_end_the_more_leave() -> None:
    relation, target = torch.tensor([[2.0, 0.0, 2.0, 0.0]] * 2), torch.tensor([1, 3])
    ahead = {4: [3 / 2 * 0.75, 1 / 2 * 0.75], 1: [3 * 0.75, 0.75], 0: [3.0, 1.0]}
    for blocks, wanted in ahead.items():
        torch.testing.assert_close(n_leaving(relation, target, blocks), torch.tensor(wanted))


def test_none_leave_of_even_attention_before_the_end() -> None:
    even, target = torch.ones(1, 9), torch.tensor([4])
    assert n_leaving(even, target, 2).item() == pytest.approx(0.0, abs=1e-5)
    assert n_leaving(even, target, 0).tolist() == [5.0]
    assert n_leaving(torch.ones(1, 1), torch.tensor([1]), 3).tolist() == [0.0]


def test_the_largest_of_each_group() -> None:
    amount = torch.tensor([1.0, 5.0, 2.0, -math.inf])
    assert largest(amount, torch.tensor([7, 3, 7, 3])).tolist() == [2.0, 5.0, 2.0, 5.0]
    assert torch.equal(largest(amount, None), amount)
