from __future__ import annotations

import pytest
import torch

from tests.kernels.kernel_inputs import DTYPES, SIZES, normal
from vtprune.errors import InputError
from vtprune.kernels.gather_tokens import gather_tokens
from vtprune.kernels.scatter_tokens import scatter_tokens


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_go_to_their_places(n: int, dtype: torch.dtype) -> None:
    index = normal(2, n).argsort(1)[:, : n // 2 + 1]
    index[1, -1] = -1
    into = (normal(2, n, 4, dtype=dtype), torch.arange(2 * n).view(2, n))
    rows = (normal(2, n, 4, seed=1, dtype=dtype)[:, : index.shape[1]], -index)
    got = scatter_tokens(index.int(), *zip(rows, into, strict=True))
    for x, y, made in zip(rows, into, got, strict=True):
        want = y.clone()
        for b in range(2):
            for k, place in enumerate(index[b].tolist()):
                if place >= 0:
                    want[b, place] = x[b, k]
        assert made.dtype == y.dtype and torch.equal(made, want)


def test_what_they_go_into_stays() -> None:
    into, before = normal(1, 4, 3), normal(1, 4, 3)
    (made,) = scatter_tokens(torch.tensor([[1]]), (torch.zeros(1, 1, 3), into))
    made.fill_(7)
    assert torch.equal(into, before)


def test_nothing_to_write() -> None:
    y = normal(2, 4, 3)
    none = torch.empty(2, 0, dtype=torch.int64)
    assert torch.equal(scatter_tokens(none, (y[:, :0], y))[0], y)
    assert scatter_tokens(none) == ()


def test_undoes_a_gather() -> None:
    index, x = torch.tensor([[3, -1, 0], [1, 2, 3]]), normal(2, 4, 3)
    assert torch.equal(scatter_tokens(index, (gather_tokens(index, x, padded=True)[0], x))[0], x)


def test_gradients_flow_to_rows_and_to_the_others() -> None:
    x, y = (normal(2, n, 3).double().requires_grad_() for n in (3, 4))
    index = torch.tensor([[0, -1, 2], [3, 1, 0]])
    assert torch.autograd.gradcheck(lambda x, y: scatter_tokens(index, (x, y))[0], (x, y))


def test_misfits_are_named() -> None:
    x, index = normal(2, 4, 3), torch.tensor([[0], [1]])
    for rows in (x, x[:, :1, :2], x[:, :1].half()):
        with pytest.raises(InputError, match=r"at \[2, 1\] places of \[2, 4, 3\] torch.float32 go"):
            scatter_tokens(index, (rows, x))
    with pytest.raises(InputError, match="scatter_tokens: index"):
        scatter_tokens(index.float(), (x[:, :1], x))
    with pytest.raises(InputError, match="index has 1 rows"):
        scatter_tokens(index[:1], (x[:1, :1], x))
