from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.kernel_inputs import SIZES, normal
from vtprune.errors import ConfigError, InputError
from vtprune.kernels.topk_sorted import ranked, topk_sorted

NAN, INF = math.nan, math.inf


def naive(row: list[float], k: int) -> list[int]:
    """Sorts (score, position) pairs; NaN counts as -inf and -0.0 == 0.0 in Python."""
    order = sorted(range(len(row)), key=lambda i: (INF if math.isnan(row[i]) else -row[i], i))
    return sorted(order[:k])


def check(scores: Tensor, k: int) -> None:
    got = topk_sorted(scores, k)
    assert got.dtype == torch.int64
    assert got.shape == (len(scores), k)
    assert got.tolist() == [naive(row, k) for row in scores.double().tolist()]


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_k(n: int, batch: int, dtype: torch.dtype) -> None:
    scores = normal(batch, n, dtype=dtype)
    for k in {0, 1, n // 3, n - 1, n}:
        check(scores, k)


SPECIAL = st.sampled_from([0.0, -0.0, 1.0, -1.0, NAN, INF, -INF, 1e-45, 6.1e-5])


@settings(max_examples=200, deadline=None)
@given(row=st.lists(SPECIAL, min_size=1, max_size=40), data=st.data())
def test_ties_and_special_values(row: list[float], data: st.DataObject) -> None:
    k = data.draw(st.integers(0, len(row)))
    check(torch.tensor([row, row[::-1]]), k)


def test_minus_zero_does_not_lose_to_zero() -> None:
    assert topk_sorted(torch.tensor([[-0.0, 0.0, -0.0, 0.0]]), 2).tolist() == [[0, 1]]


def test_nan_is_taken_last() -> None:
    assert topk_sorted(torch.tensor([[NAN, -5.0, NAN, -7.0]]), 3).tolist() == [[0, 1, 3]]
    assert topk_sorted(torch.full((1, 4), NAN), 2).tolist() == [[0, 1]]


def test_ranked_puts_ties_in_order_and_nan_last() -> None:
    scores = torch.tensor([[0.0, NAN, -0.0, 3.0, 3.0, -1.0], [INF, 0.5, -INF, NAN, 0.5, INF]])
    assert ranked(scores).tolist() == [[3, 4, 0, 2, 5, 1], [0, 5, 1, 4, 2, 3]]


def test_float64_keeps_its_differences() -> None:
    assert topk_sorted(torch.tensor([[1.0, 1.0 + 1e-12]], dtype=torch.float64), 1).tolist() == [[1]]


def test_layout_does_not_matter_and_the_input_stays() -> None:
    scores = normal(9, 3).t()
    before = scores.clone()
    check(scores, 4)
    assert torch.equal(scores, before)


def test_a_score_with_gradient_is_fine() -> None:
    assert not topk_sorted(normal(1, 5).requires_grad_(), 2).requires_grad


@pytest.mark.parametrize("k", [-1, 6, True, 2.0])
def test_k_out_of_range(k: int) -> None:
    with pytest.raises(ConfigError, match="0 to 5"):
        topk_sorted(torch.zeros(1, 5), k)


@pytest.mark.parametrize("scores", [torch.zeros(5), torch.zeros(1, 5, 1), torch.zeros(1, 5).int()])
def test_other_tensors_are_refused(scores: Tensor) -> None:
    with pytest.raises(InputError, match="B, N"):
        topk_sorted(scores, 1)
