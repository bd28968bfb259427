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
    with pytest.raises(ConfigError, match="unknown mode 'fps'; known: max_min, max_sum, mmr, dpp"):
        greedy_select(x, 2, mode="fps")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="k=6"):
        greedy_select(x, 6)
    with pytest.raises(ConfigError, match="gram_bytes=0"):
        greedy_select(x, 2, gram_bytes=0)
    with pytest.raises(InputError, match="B, N, D"):
        greedy_select(x[0], 2)


def naive_max_sum(x: Tensor, k: int, pivot: int) -> list[int]:
    """Max-sum picks of one image by the definition, in float64."""
    unit = x.double() / x.double().norm(dim=1, keepdim=True)
    distance = 1 - unit @ unit.t()
    picks = [pivot]
    while len(picks) < k:
        left = [i for i in range(len(x)) if i not in picks]
        picks.append(max(left, key=lambda i: (float(distance[i, picks].sum()), -i)))
    return picks[:k]


def naive_dpp(x: Tensor, relevance: Tensor, k: int) -> list[int]:
    """DPP picks of one image by determinants in float64; for k up to the rank."""
    unit = x.double() / x.double().norm(dim=1, keepdim=True)
    weighted = unit * relevance.double()[:, None]
    kernel = weighted @ weighted.t()
    picks: list[int] = []
    while len(picks) < k:
        left = [i for i in range(len(x)) if i not in picks]
        sets = {i: torch.tensor([*picks, i]) for i in left}
        gain = {i: float(torch.linalg.det(kernel[s][:, s])) for i, s in sets.items()}
        picks.append(max(left, key=lambda i: (gain[i], -i)))
    return picks


def weights(batch: int, n: int, seed: int = 3) -> Tensor:
    return torch.rand(batch, n, generator=torch.Generator().manual_seed(seed)) + 0.05


@pytest.mark.parametrize("n", [n for n in SIZES if n < 100] + [40])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("gram_bytes", [1, 1 << 30])
def test_the_other_modes_match_their_definitions(
    n: int, batch: int, dtype: torch.dtype, gram_bytes: int
) -> None:
    x, pivot, relevance = normal(batch, n, 12, dtype=dtype), torch.arange(batch) % n, weights(3, n)
    for k in {0, 1, n // 2, n}:
        got = greedy_select(x, k, "max_sum", pivot=pivot, gram_bytes=gram_bytes)
        assert got.tolist() == [naive_max_sum(row, k, int(pivot[b])) for b, row in enumerate(x)]
    for k in {0, 1, min(n, 10)}:
        got = greedy_select(x, k, "dpp", relevance=relevance[:batch], gram_bytes=gram_bytes)
        assert got.tolist() == [naive_dpp(row, relevance[b], k) for b, row in enumerate(x)]


def test_the_published_example_of_max_sum() -> None:
    torch.manual_seed(7)
    x = torch.randn(10, 4)[None]
    assert greedy_select(x, 5, "max_sum", pivot=torch.tensor([3])).tolist() == [[3, 8, 2, 4, 7]]


@pytest.mark.parametrize("gram_bytes", [1, 1 << 30])
def test_more_picks_than_dimensions_follow_the_relevance(gram_bytes: int) -> None:
    x, relevance = normal(2, 30, 4), weights(2, 30)
    got = greedy_select(x, 30, "dpp", relevance=relevance, gram_bytes=gram_bytes)
    for b in range(2):
        assert got[b, :4].tolist() == naive_dpp(x[b], relevance[b], 4)
        rest = [i for i in range(30) if i not in got[b, :4].tolist()]
        assert got[b, 4:].tolist() == sorted(rest, key=lambda i: -float(relevance[b, i]))


def test_a_row_of_full_rank_goes_on_when_another_is_exhausted() -> None:
    x = normal(2, 20, 32)
    x[0] = x[0, :1]
    relevance = weights(2, 20)
    got = greedy_select(x, 12, "dpp", relevance=relevance)
    assert got[0].tolist() == relevance[0].argsort(descending=True)[:12].tolist()
    assert got[1].tolist() == naive_dpp(x[1], relevance[1], 12)


@pytest.mark.parametrize("gram_bytes", [1, 1 << 30])
@pytest.mark.parametrize("width", [1, 37, 512])
def test_equal_tokens_are_taken_in_order_in_every_mode(gram_bytes: int, width: int) -> None:
    x = normal(2, 1, width).expand(2, 65, width)
    relevance, pivot = torch.full((2, 65), 0.7), torch.zeros(2, dtype=torch.int64)
    got = greedy_select(x, 65, "dpp", relevance=relevance, gram_bytes=gram_bytes)
    assert got.tolist() == [list(range(65))] * 2
    got = greedy_select(x, 65, "max_sum", pivot=pivot, gram_bytes=gram_bytes)
    assert got.tolist() == [list(range(65))] * 2


@pytest.mark.parametrize("gram_bytes", [1, 1 << 30])
def test_broken_tokens_come_last_in_every_mode(gram_bytes: int) -> None:
    x, relevance = normal(2, 12, 16), weights(2, 12)
    x[0, 3, 2], x[0, 7, 0] = float("nan"), float("inf")
    pivot = torch.tensor([2, 2])
    got = greedy_select(x, 12, "max_sum", pivot=pivot, gram_bytes=gram_bytes)
    assert got[0, -2:].tolist() == [3, 7]
    assert got[1].tolist() == naive_max_sum(x[1], 12, 2)
    relevance[0, 5] = float("nan")
    got = greedy_select(x, 12, "dpp", relevance=relevance, gram_bytes=gram_bytes)
    assert got[0, -3:].tolist() == [3, 5, 7]
    assert got[1].tolist() == naive_dpp(x[1], relevance[1], 12)


def test_a_zero_vector_or_one_without_relevance_adds_nothing() -> None:
    x, relevance = normal(1, 9, 16), weights(1, 9)
    x[0, 5] = 0
    relevance[0, 2], relevance[0, 5] = 0.0, 0.9
    assert greedy_select(x, 9, "dpp", relevance=relevance)[0, -2:].tolist() == [5, 2]


def test_blocks_of_the_matrix_fit_together(monkeypatch: pytest.MonkeyPatch) -> None:
    from vtprune.kernels import _greedy as module

    x = normal(2, 123, 16)
    wanted = greedy_select(x, 60)
    monkeypatch.setattr(module, "_BLOCK", 50)
    assert torch.equal(greedy_select(x, 60), wanted)


def test_what_a_mode_takes() -> None:
    x, pivot, relevance = normal(2, 5, 4), torch.zeros(2, dtype=torch.int64), torch.ones(2, 5)
    with pytest.raises(ConfigError, match="mode 'dpp' needs relevance="):
        greedy_select(x, 2, "dpp")
    with pytest.raises(ConfigError, match="mode 'max_min' takes no pivot="):
        greedy_select(x, 2, pivot=pivot)
    with pytest.raises(ConfigError, match="mode 'max_sum' takes no relevance="):
        greedy_select(x, 2, "max_sum", pivot=pivot, relevance=relevance)
    with pytest.raises(InputError, match=r"relevance is \[2, 4\]"):
        greedy_select(x, 2, "dpp", relevance=relevance[:, 1:])
    with pytest.raises(InputError, match=r"pivot is \[1\]"):
        greedy_select(x, 2, "max_sum", pivot=pivot[:1])
    with pytest.raises(InputError, match="from 0 to 4"):
        greedy_select(x, 2, "max_sum", pivot=pivot + 5)
