from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels.kernel_inputs import DTYPES, SIZES, normal, relative_error
from vtprune import kernels
from vtprune.errors import UnsupportedError
from vtprune.kernels.row_pair_stats import Stats, cosine, row_pair_stats


def expected(x: Tensor, y: Tensor) -> Stats:
    with kernels.use("torch"):
        found = row_pair_stats(x.double(), y.double())
    kernels.reset_stats()
    return found


def check(x: Tensor, y: Tensor) -> None:
    for got, want in zip(row_pair_stats(x, y), expected(x, y), strict=True):
        assert got.dtype == torch.float32 and got.shape == x.shape[:-1]
        assert relative_error(got, want) < 1e-6


def pair(*shape: int, device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    x, y = normal(*shape), normal(*shape, seed=1)
    return x.to(device, dtype), (y + 0.5 * x).to(device, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", SIZES)
def test_every_row_is_measured(d: int, dtype: torch.dtype, device: str) -> None:
    for rows in (1, 7, 130):
        check(*pair(rows, d, device=device, dtype=dtype))


def test_long_rows_are_read_in_tiles(device: str) -> None:
    for d in (2048, 2049, 4100):
        check(*pair(2, 3, d, device=device, dtype=torch.float16))


def test_the_two_may_have_dtypes_of_their_own(device: str) -> None:
    x, y = pair(9, 40, device=device)
    check(x.half(), y)
    check(x, y.bfloat16())


def test_views_are_read_as_they_lie(device: str) -> None:
    x, y = pair(4, 9, 40, device=device)
    check(x[1:], x[:-1])
    check(x[:, 2:, 3:36], y[:, :-2, 5:38])
    check(x.transpose(0, 1), y.transpose(0, 1))
    check(x, y[:, :1].expand_as(x))
    check(x.mT, y.mT)
    x, y = (t.unflatten(2, (5, 8)).permute(0, 2, 1, 3) for t in (x, y))  # [B, H, N, d]
    check(x, y)
    check(x[0, 0, 0], y[0, 0, 0])


def test_rows_without_numbers_and_no_rows(device: str) -> None:
    for stat in row_pair_stats(*pair(3, 0, device=device)):
        assert stat.tolist() == [0.0, 0.0, 0.0]
    assert row_pair_stats(*pair(2, 0, 5, device=device))[0].shape == (2, 0)


def test_what_is_no_number_spoils_its_own_row(device: str) -> None:
    x, y = pair(6, 17, device=device)
    x[1, 3], y[2, 16], x[3], x[4] = float("nan"), float("inf"), 0.0, -0.0
    norm_x, norm_y, dot = row_pair_stats(x, y)
    assert norm_x.isnan().nonzero().flatten().tolist() == [1]
    assert norm_y.isinf().nonzero().flatten().tolist() == [2]
    assert dot.isfinite().tolist() == [True, False, False, True, True, True]
    alike = cosine(norm_x, norm_y, dot)
    assert alike[3:5].tolist() == [0.0, 0.0] and bool(alike[5].isfinite())


def test_a_graph_holds_the_kernel(device: str) -> None:
    x, y = pair(2, 5, 33, device=device)

    def alike(x: Tensor, y: Tensor) -> Tensor:
        return 2 * cosine(*row_pair_stats(x, y))

    got = torch.compile(alike, fullgraph=True, backend="aot_eager")(x, y)
    assert kernels.stats() == {("row_pair_stats", "triton"): 1}
    assert relative_error(got, 2 * cosine(*expected(x, y))) < 2e-6


def test_the_custom_operation_says_what_it_makes(device: str) -> None:
    x, y = pair(2, 5, 17, device=device)
    for args in ((x, y), (x[0, 0], y[0, 0])):
        torch.library.opcheck(torch.ops.vtprune.row_pair_stats.default, args)


def test_what_the_kernel_does_not_take_is_said(device: str) -> None:
    x, y = pair(2, 9, device=device)
    with pytest.raises(UnsupportedError, match=r"no kernel for this call: rows are float64.*use"):
        row_pair_stats(x, y.double())
