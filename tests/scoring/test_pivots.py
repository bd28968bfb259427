from __future__ import annotations

import torch

from vtprune.scoring.pivots import largest, least_similar, set_order, shares

NAN = float("nan")


def test_the_largest_come_in_descending_order_and_nan_last() -> None:
    x = torch.tensor([1.0, 5.0, NAN, 5.0, 2.0])
    assert largest(x, 3).tolist() == [1, 3, 4]
    assert largest(x, 9).tolist() == [1, 3, 4, 0, 2]
    assert largest(x[:0], 4).tolist() == []


def test_a_python_set_is_walked_by_its_table() -> None:
    places = torch.tensor([5, 40, 33, 8, 100, 7, 64, 2])
    order = set_order(places)
    assert places[order].tolist() == list({5, 40, 33, 8, 100, 7, 64, 2})
    # Eight entries have 32 slots: 64 % 32 = 0, 33 % 32 = 1, 2, 100 % 32 = 4, 5, 7, 8; 40 % 32 is 8
    # too, and goes on from there.
    assert places[order][:6].tolist() == [64, 33, 2, 100, 5, 7]


def test_shares_sum_up_and_the_first_are_larger() -> None:
    assert shares(10, 4) == [3, 3, 2, 2]
    assert shares(2, 3) == [1, 1, 0]
    assert shares(0, 2) == [0, 0]


def test_pivots_take_in_turn_what_is_least_similar() -> None:
    similarity = torch.tensor([[9.0, 0.1, 0.2, 0.3, 0.9], [0.0, 0.1, 0.2, 0.8, 0.7]])
    taken = torch.tensor([0])
    assert least_similar(similarity, [2, 1], taken).tolist() == [0, 1, 2, 4]
    assert least_similar(similarity.flip(0), [1, 2], taken).tolist() == [0, 1, 2, 3]
    assert least_similar(similarity, [0, 0], taken).tolist() == [0]


def test_ties_go_to_the_lower_index_and_nan_is_taken_last() -> None:
    similarity = torch.tensor([[0.5, NAN, 0.5, 0.5, 1.0]])
    none = torch.tensor([], dtype=torch.int64)
    assert least_similar(similarity, [2], none).tolist() == [0, 2]
    assert least_similar(similarity, [4], none).tolist() == [0, 2, 3, 4]
    assert least_similar(similarity, [5], none).tolist() == [0, 1, 2, 3, 4]
