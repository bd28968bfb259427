from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from tests.kernels.kernel_inputs import DTYPES, SIZES, normal, relative_error
from vtprune import kernels
from vtprune.errors import InputError, UnsupportedError
from vtprune.kernels.row_pair_stats import cosine, row_pair_stats


def by_hand(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    x, y = x.double(), y.double()
    return x.square().sum(-1).sqrt(), y.square().sum(-1).sqrt(), torch.linalg.vecdot(x, y)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [*SIZES, 4096])
def test_float64_says_the_same(d: int, dtype: torch.dtype) -> None:
    x, y = normal(2, 9, d, dtype=dtype), normal(2, 9, d, seed=1, dtype=dtype) * 3
    for got, want in zip(row_pair_stats(x, y), by_hand(x, y), strict=True):
        assert got.dtype == torch.float32 and got.shape == (2, 9)
        assert relative_error(got, want) < 2e-6
    for got, want in zip(row_pair_stats(x.double(), y), by_hand(x, y), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=3e-6, atol=1e-6)
    assert row_pair_stats(x.double(), y.double())[2].dtype == torch.float64


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (2, 2, 3, 5), (0, 5), (3, 0)])
def test_any_leading_dimensions(shape: tuple[int, ...]) -> None:
    x, y = normal(*shape), normal(*shape, seed=1)
    for got, want in zip(row_pair_stats(x, y), by_hand(x, y), strict=True):
        assert got.shape == shape[:-1]
        torch.testing.assert_close(got.double(), want)


def test_one_row_for_all() -> None:
    x, y = normal(2, 7, 16), normal(2, 1, 16, seed=1)
    _, norm, dot = row_pair_stats(x, y.expand_as(x))
    torch.testing.assert_close(norm, y.norm(dim=-1).expand(2, 7))
    torch.testing.assert_close(dot, (x @ y.mT)[..., 0])


def test_the_cosine_is_that_of_torch() -> None:
    x, y = normal(4, 6, 33), normal(4, 6, 33, seed=1)
    x[0, 0], y[0, 1], x[0, 2], y[0, 2] = 0.0, 0.0, 0.0, 0.0
    x[1, 0], x[1, 1], y[1, 1] = 1e-12, 1e-9, 1e-9  # a norm below 1e-8 counts as 1e-8
    x[2, 0, 5] = torch.nan
    y[3, 3] = -x[3, 3]
    got, want = cosine(*row_pair_stats(x, y)), cosine_similarity(x, y, dim=-1)
    torch.testing.assert_close(got, want, equal_nan=True, atol=1e-6, rtol=1e-6)
    assert 0.01 < float(got[1, 1]) < 0.99 and int(got.isnan().sum()) == 1


def test_gradients_end_here() -> None:
    x = normal(3, 8).requires_grad_()
    assert not any(stat.requires_grad for stat in row_pair_stats(x, x))


@pytest.mark.parametrize(
    ("x", "y"),
    [
        (torch.zeros(2, 3), torch.zeros(1, 3)),
        (torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int64)),
        (torch.tensor(1.0), torch.tensor(1.0)),
    ],
)
def test_what_is_no_pair_is_refused(x: Tensor, y: Tensor) -> None:
    with pytest.raises(InputError, match=r"give two float tensors of one shape \[\.\.\., D\]"):
        row_pair_stats(x, y)


def test_a_cpu_has_no_kernel() -> None:
    x = normal(3, 8)
    with kernels.use("triton"), pytest.raises(UnsupportedError, match="row_pair_stats"):
        row_pair_stats(x, x)
