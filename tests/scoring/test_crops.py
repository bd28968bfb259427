"""Crops, their worth and their shares, by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vtprune.scoring.crops import crop_order, crop_scores, crop_sizes, fitting_quotas, quotas

NAN = float("nan")
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("n", "crops", "sizes"), [(7, 3, [3, 2, 2]), (6, 3, [2, 2, 2]), (3, 3, [1, 1, 1]), (5, 1, [5])]
)
def test_the_first_crops_are_the_longer_ones(n: int, crops: int, sizes: list[int]) -> None:
    assert crop_sizes(n, crops, CPU).tolist() == sizes


def test_worth_is_attention_with_variances_on_its_scale() -> None:
    # crop of 3: cosines 1, 0, 0; means over the others 0.5, 0.5, 0
    # variances: (0.25 + 0.25 + 0.25) / 2 = 0.375 twice, 0; mean 0.25
    # attention 100, 200, 300: mean 200, so the variances add 0.09 * 200 in the mean
    tokens = torch.tensor([[[2.0, 0], [1, 0], [0, 5], [1, 0], [0, 3]]])
    attention = torch.tensor([[0.1, 0.2, 0.3, 0.01, 0.03]])
    # crop of 2: cosine 0, so no variance: 20
    worth = crop_scores(tokens, attention, 2, 0.09)
    torch.testing.assert_close(worth, torch.tensor([[218.0, 20.0]]), rtol=1e-5, atol=0)
    bare = crop_scores(tokens, attention, 2, 0.0)
    torch.testing.assert_close(bare, torch.tensor([[200.0, 20.0]]))


def test_a_crop_of_one_token_is_worth_its_bare_attention() -> None:
    attention = torch.tensor([[0.1, 0.3, 0.5]])
    worth = crop_scores(torch.randn(1, 3, 4), attention, 2, 0.0)
    torch.testing.assert_close(worth, torch.tensor([[200.0, 0.5]]))


def test_nan_and_inf_count_as_nothing() -> None:
    attention = torch.tensor([[NAN, 0.3, 0.5, float("inf")]])
    tokens = torch.tensor([[[NAN, NAN], [0, 1], [1, 0], [1, float("inf")]]])
    worth = crop_scores(tokens, attention, 2, 0.0)
    torch.testing.assert_close(worth, torch.tensor([[150.0, 250.0]]))


def test_worth_is_computed_in_float32_under_autocast() -> None:
    tokens, attention = torch.randn(2, 12, 8), torch.rand(2, 12)
    worth = crop_scores(tokens, attention, 3, 0.5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(crop_scores(tokens, attention, 3, 0.5), worth)


def test_whole_parts_then_one_more_for_the_crops_worth_most() -> None:
    worth = torch.tensor([[5.1, 3.0, 1.9], [1.0, 1.0, 1.0]])
    # 4 * (0.51, 0.3, 0.19) = 2.04, 1.2, 0.76: one over goes to the first
    # 4 / 3 each: one over goes to the first of equals
    assert quotas(worth, 4).tolist() == [[3, 1, 0], [2, 1, 1]]


def test_quotas_of_nothing_go_to_the_first_once_each() -> None:
    assert quotas(torch.zeros(1, 3), 2).tolist() == [[1, 1, 0]]
    assert quotas(torch.zeros(1, 3), 5).tolist() == [[1, 1, 1]]


def test_what_does_not_fit_goes_to_the_others_by_worth() -> None:
    worth, room = torch.tensor([[8.2, 3.0, 0.8]]), torch.tensor([[2, 4, 4]])
    # 6 tokens: 4.1, 1.5, 0.4 -> 4 + 1, 1, 0, of which 2, 1, 0 fit; the other 3 by 3 : 0.8
    # 2.4, 0.6 -> 2 + 1, 0
    assert quotas(worth, 6).tolist() == [[5, 1, 0]]
    assert fitting_quotas(worth, 6, room).tolist() == [[2, 4, 0]]


def test_quotas_that_fit_stay_as_they_are() -> None:
    worth, room = torch.tensor([[5.0, 3.0, 2.0]]), torch.tensor([[9, 9, 9]])
    assert torch.equal(fitting_quotas(worth, 7, room), quotas(worth, 7))


@given(
    worth=st.lists(st.floats(0, 1e3, width=32), min_size=1, max_size=6),
    room=st.lists(st.integers(0, 5), min_size=6, max_size=6),
    k=st.integers(0, 40),
)
def test_fitting_quotas_fill_the_budget_or_the_room(
    worth: list[float], room: list[int], k: int
) -> None:
    rooms = torch.tensor([room[: len(worth)]] * 2)
    given_out = fitting_quotas(torch.tensor([worth, [1.0] * len(worth)]), k, rooms)
    assert ((given_out >= 0) & (given_out <= rooms)).all()
    assert given_out.sum(1).tolist() == [min(k, int(rooms[0].sum()))] * 2


def test_each_crop_is_sorted_in_its_place() -> None:
    attention = torch.tensor([[0.1, 0.9, 0.5, NAN, 0.7], [0.2, 0.2, 0.3, 0.0, 0.0]])
    order, crop, place = crop_order(attention, crop_sizes(5, 2, CPU))
    assert order.tolist() == [[1, 2, 0, 4, 3], [2, 0, 1, 3, 4]]
    assert crop.tolist() == [[0, 0, 0, 1, 1]] * 2
    assert place.tolist() == [[0, 1, 2, 0, 1]] * 2
