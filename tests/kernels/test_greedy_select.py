from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.kernel_inputs import DTYPES, SIZES, normal
from vtprune.errors import ConfigError, InputError
from vtprune.kernels.greedy_select import greedy_select


def naive(x: Tensor, k: int) -> list[int]:
    """Max-min picks of one image by the definition, in float64, all distances recomputed."""
    x = x.double()
    n = len(x)
    unit = x / x.norm(dim=1, keepdim=True)
    distance = 1 - unit @ unit.t()
    distance = torch.minimum(distance, distance.t())  # a product rounds (i, j) and (j, i) apart
    nearest = [
        min((distance[i, j].item() for j in range(n) if j != i), default=9) for i in range(n)
    ]
    picks = [max(range(n), key=lambda i: (nearest[i], -i))][:k]
    while len(picks) < k:
        left = [i for i in range(n) if i not in picks]
        picks.append(max(left, key=lambda i: (min(distance[i, j].item() for j in picks), -i)))
    return picks


@pytest.mark.parametrize("n", [n for n in SIZES if n < 100] + [40])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_matches_the_definition(n: int, batch: int, dtype: torch.dtype) -> None:
    x = normal(batch, n, 12, dtype=dtype)
    for k in {0, 1, n // 2, n}:
        got = greedy_select(x, k)
        assert got.dtype == torch.int64
        assert got.tolist() == [naive(row, k) for row in x]


@pytest.mark.parametrize("gram_bytes", [1, 123 * 4 * 10, 123 * 123 * 4, 2 * 123 * 123 * 4])
def test_the_memory_limit_changes_nothing(gram_bytes: int) -> None:
    x = normal(3, 123, 16)
    assert torch.equal(greedy_select(x, 60, gram_bytes=gram_bytes), greedy_select(x, 60))


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 12),
    seed=st.integers(0, 10_000),
    gram_bytes=st.integers(1, 2000),
    data=st.data(),
)
def test_any_size_and_limit(n: int, seed: int, gram_bytes: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, n))
    x = normal(2, n, 5, seed=seed).double()
    got = greedy_select(x, k, gram_bytes=gram_bytes)
    assert got.tolist() == [naive(row, k) for row in x]


@pytest.mark.parametrize("gram_bytes", [1, 1 << 30])
@pytest.mark.parametrize("width", [1, 37, 512])
def test_equal_tokens_are_taken_in_order(gram_bytes: int, width: int) -> None:
    x = normal(2, 1, width).expand(2, 65, width)
    got = greedy_select(x, 65, gram_bytes=gram_bytes)
    assert got.tolist() == [list(range(65))] * 2


def test_a_duplicate_waits_for_all_different_tokens() -> None:
    x = normal(1, 10, 8)
    x[0, 4] = x[0, 9]
    picks = greedy_select(x, 9)[0].tolist()
    assert len({4, 9} & set(picks)) == 1


@pytest.mark.parametrize("gram_bytes", [1, 1 << 30])
def test_broken_tokens_come_last_and_touch_no_other(gram_bytes: int) -> None:
    x = normal(2, 12, 8)
    x[0, 3, 2], x[0, 7, 0] = float("nan"), float("inf")
    got = greedy_select(x, 12, gram_bytes=gram_bytes)
    assert got[0, -2:].tolist() == [3, 7]
    assert sorted(got[0].tolist()) == list(range(12))
    sound = [i for i in range(12) if i not in (3, 7)]
    assert [sound[i] for i in naive(x[0, sound], 10)] == got[0, :10].tolist()
    assert got[1].tolist() == naive(x[1], 12)


def test_nothing_but_broken_or_zero_tokens() -> None:
    assert greedy_select(torch.full((1, 4, 3), float("nan")), 4).tolist() == [[0, 1, 2, 3]]
    assert greedy_select(torch.zeros(1, 4, 3), 4).tolist() == [[0, 1, 2, 3]]


def test_zero_vectors_are_finite_and_unique() -> None:
    x = normal(1, 9, 4)
    x[0, 5] = 0
    assert sorted(greedy_select(x, 9)[0].tolist()) == list(range(9))


def test_length_does_not_matter() -> None:
    x = normal(2, 30, 6).double()
    scale = torch.rand(2, 30, 1, generator=torch.Generator().manual_seed(1)).double() + 0.5
    assert torch.equal(greedy_select(x, 12), greedy_select(x * scale, 12))


def test_autocast_does_not_lower_the_precision() -> None:
    x = normal(1, 60, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert greedy_select(x, 30)[0].tolist() == naive(x[0], 30)


def test_bad_arguments() -> None:
    x = normal(1, 5, 4)
    with pytest.raises(ConfigError, match="'dpp'"):
        greedy_select(x, 2, mode="dpp")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="k=6"):
        greedy_select(x, 6)
    with pytest.raises(ConfigError, match="gram_bytes=0"):
        greedy_select(x, 2, gram_bytes=0)
    with pytest.raises(InputError, match="B, N, D"):
        greedy_select(x[0], 2)
