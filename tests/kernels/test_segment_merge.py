from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.kernel_inputs import DTYPES, SIZES, normal, relative_error
from vtprune.errors import ConfigError, InputError
from vtprune.kernels.segment_merge import segment_merge


def naive(x: Tensor, source: Tensor, target: Tensor, weight: Tensor, n_out: int) -> Tensor:
    """Adds edge by edge in float64."""
    out = torch.zeros(len(x), n_out, *x.shape[2:], dtype=torch.float64)
    for b in range(len(x)):
        for e in range(source.shape[1]):
            out[b, target[b, e]] += weight[b, e].double() * x[b, source[b, e]].double()
    return out


def edges(batch: int, n: int, e: int, n_out: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    source = torch.randint(0, n, (batch, e), generator=generator)
    target = torch.randint(0, n_out, (batch, e), generator=generator)
    return source, target, torch.randn(batch, e, generator=generator)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("n_out", [1, 6])
def test_matches_the_definition(n: int, batch: int, n_out: int) -> None:
    x, mix = normal(batch, n, 5), edges(batch, n, 2 * n + 1, n_out)
    got = segment_merge(x, *mix, n_out)
    assert got.shape == (batch, n_out, 5)
    assert relative_error(got, naive(x, *mix, n_out)) < 1e-6


@settings(max_examples=50, deadline=None)
@given(
    n=st.integers(1, 8),
    e=st.integers(0, 12),
    n_out=st.integers(1, 7),
    batch=st.integers(1, 3),
    chunk_bytes=st.integers(1, 2000),
)
def test_the_memory_limit_changes_nothing(
    n: int, e: int, n_out: int, batch: int, chunk_bytes: int
) -> None:
    x, mix = normal(batch, n, 3), edges(batch, n, e, n_out)
    got = segment_merge(x, *mix, n_out, chunk_bytes=chunk_bytes)
    assert torch.equal(got, segment_merge(x, *mix, n_out))
    assert torch.allclose(got.double(), naive(x, *mix, n_out), atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_are_taken_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    x = torch.ones(1, 4096, 2).to(dtype)  # 16-bit sums of ones stop growing at 256 or 2048
    source, target = torch.arange(4096)[None], torch.zeros(1, 4096, dtype=torch.int64)
    got = segment_merge(x, source, target, torch.ones(1, 4096), 1)
    assert got.dtype == dtype
    assert got.flatten().tolist() == [4096.0, 4096.0]


def test_float64_stays() -> None:
    x, (source, target, weight) = normal(2, 9, 3).double(), edges(2, 9, 20, 4)
    got = segment_merge(x, source, target, weight.double(), 4)
    assert got.dtype == torch.float64
    assert relative_error(got, naive(x, source, target, weight, 4)) < 1e-14


def test_trailing_dimensions_of_any_number() -> None:
    source, target, weight = edges(2, 9, 20, 4)
    for shape in [(2, 9), (2, 9, 2, 3)]:
        x = normal(*shape)
        got = segment_merge(x, source, target, weight, 4)
        assert got.shape == (2, 4, *shape[2:])
        assert relative_error(got, naive(x, source, target, weight, 4)) < 1e-6


def test_an_output_without_edges_is_zero() -> None:
    got = segment_merge(
        normal(1, 3, 2), torch.tensor([[0]]), torch.tensor([[2]]), torch.ones(1, 1), 4
    )
    assert got[0, [0, 1, 3]].abs().sum() == 0
    assert got[0, 2].abs().sum() > 0


def test_targets_outside_count_nowhere() -> None:
    x = normal(2, 3, 2)
    target = torch.tensor([[-1, 0, 2], [1, 2, -1]])
    source, weight = torch.tensor([[0, 1, 2]] * 2), torch.ones(2, 3)
    got = segment_merge(x, source, target, weight, 2)
    assert torch.equal(got[0, 0], x[0, 1])
    assert torch.equal(got[1, 1], x[1, 0])
    assert got[0, 1].abs().sum() == got[1, 0].abs().sum() == 0


def test_nan_stays_where_it_flows() -> None:
    x = normal(2, 4, 3)
    x[0, 1] = float("nan")
    source = torch.tensor([[0, 1, 2, 3]] * 2)
    target = torch.tensor([[0, 0, 1, 2]] * 2)
    got = segment_merge(x, source, target, torch.ones(2, 4), 3)
    assert got[0, 0].isnan().all()
    assert got[0, 1:].isfinite().all()
    assert got[1].isfinite().all()


def test_repeated_runs_are_equal_bit_for_bit() -> None:
    x, mix = normal(2, 123, 9), edges(2, 123, 500, 5)
    first = segment_merge(x, *mix, 5)
    assert all(torch.equal(segment_merge(x, *mix, 5), first) for _ in range(5))


def test_gradients_of_tokens_and_weights() -> None:
    source, target, weight = edges(2, 5, 9, 3)
    x, weight = normal(2, 5, 2).double().requires_grad_(), weight.double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, weight: segment_merge(x, source, target, weight, 3), (x, weight)
    )


def test_misfits_are_named() -> None:
    x, ids, ones = normal(2, 4, 3), torch.zeros(2, 5, dtype=torch.int64), torch.ones(2, 5)
    with pytest.raises(InputError, match="one shape"):
        segment_merge(x, ids, ids[:, :4], ones, 2)
    with pytest.raises(InputError, match="1 rows"):
        segment_merge(x[:1], ids, ids, ones, 2)
    with pytest.raises(InputError, match="floats"):
        segment_merge(x.long(), ids, ids, ones, 2)
    with pytest.raises(ConfigError, match="n_out=-1"):
        segment_merge(x, ids, ids, ones, -1)
