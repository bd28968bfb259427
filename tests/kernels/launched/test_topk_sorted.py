from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels.kernel_inputs import DTYPES, SIZES, normal
from vtprune import kernels
from vtprune.errors import UnsupportedError
from vtprune.kernels.topk_sorted import topk_mapped, topk_sorted


def tied(rows: int, n: int, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Scores of which many are equal, with NaN, both zeros and both infinities."""
    x = (normal(rows, n) * 2).round()
    for place, value in ((0, "nan"), (n // 2, "-0.0"), (n - 1, "inf"), (n // 3, "-inf")):
        x[:: place % 2 + 1, place] = float(value)
    return x.to(device, dtype)


def expected(x: Tensor, k: int | list[int]) -> tuple[Tensor, Tensor]:
    with kernels.use("torch"):
        found = topk_mapped(x, k)
    kernels.reset_stats()
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", SIZES)
def test_picks_what_torch_picks(n: int, dtype: torch.dtype, device: str) -> None:
    x = tied(3, n, device, dtype)
    for k in {0, 1, n // 2, n}:
        index, inverse = expected(x, k)
        assert torch.equal(topk_sorted(x, k), index)
        assert torch.equal(topk_mapped(x, k)[1], inverse)


def test_long_rows_are_read_in_tiles(device: str) -> None:
    x = tied(2, 9001, device)
    for k in (1, 4096, 8999):
        for got, want in zip(topk_mapped(x, k), expected(x, k), strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("n", (8, 123))
def test_rows_with_counts_of_their_own(n: int, device: str) -> None:
    x = tied(4, n, device)
    k = [0, n, 1, n // 2]
    for got, want in zip(topk_mapped(x, k), expected(x, k), strict=True):
        assert torch.equal(got, want)


def test_views_are_read_as_they_lie(device: str) -> None:
    x = tied(6, 40, device)
    for view in (x[::2, 3:37], x.mT):
        assert torch.equal(topk_sorted(view, 5), expected(view, 5)[0])


def test_a_graph_holds_the_kernel(device: str) -> None:
    x = tied(2, 33, device)

    def keep(x: Tensor) -> Tensor:
        return topk_sorted(x, 5) * 2

    got = torch.compile(keep, fullgraph=True, backend="aot_eager")(x)
    assert kernels.stats() == {("topk_sorted", "triton"): 1}
    assert torch.equal(got, 2 * expected(x, 5)[0])


def test_the_custom_operation_says_what_it_makes(device: str) -> None:
    x = tied(3, 17, device)
    counts = torch.tensor([1, 5, 17], dtype=torch.int32, device=device)
    for args in ((x, 4, None, False), (x, 17, counts, True)):
        torch.library.opcheck(torch.ops.vtprune.topk_sorted.default, args)


def test_what_the_kernel_does_not_take_is_said(device: str) -> None:
    with pytest.raises(UnsupportedError, match=r"no kernel for this call: scores are float64.*use"):
        topk_sorted(torch.zeros(2, 9, dtype=torch.float64, device=device), 3)
