from __future__ import annotations

import pytest
import torch

from tests.kernels.kernel_inputs import DTYPES, SIZES, normal
from vtprune.errors import InputError
from vtprune.kernels.gather_tokens import gather_tokens
from vtprune.kernels.topk_sorted import topk_sorted


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("batch", [1, 3])
def test_rows_of_several_tensors(n: int, batch: int) -> None:
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(0, n, (batch, 5), generator=generator)
    wide, flat, ids = normal(batch, n, 4, 3), normal(batch, n), torch.arange(batch * n).view(-1, n)
    got = gather_tokens(index, wide, flat, ids)
    for x, y in zip((wide, flat, ids), got, strict=True):
        assert y.dtype == x.dtype
        for b in range(batch):
            assert torch.equal(y[b], torch.stack([x[b, i] for i in index[b].tolist()]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_are_copied_exactly(dtype: torch.dtype) -> None:
    x = normal(2, 9, 5, dtype=dtype)
    (y,) = gather_tokens(torch.arange(9).expand(2, 9), x)
    assert torch.equal(y, x)


def test_int32_is_accepted_and_no_row_is_a_result_too() -> None:
    x = normal(2, 9, 5)
    (y,) = gather_tokens(torch.tensor([[3], [8]], dtype=torch.int32), x)
    assert torch.equal(y[:, 0], torch.stack([x[0, 3], x[1, 8]]))
    assert gather_tokens(torch.empty(2, 0, dtype=torch.int64), x)[0].shape == (2, 0, 5)
    assert gather_tokens(torch.zeros(2, 1, dtype=torch.int64)) == ()


def test_gradients_flow_to_the_tensors() -> None:
    x = normal(2, 4, 3).double().requires_grad_()
    index = torch.tensor([[0, 2, 2], [3, 1, 0]])
    assert torch.autograd.gradcheck(lambda x: gather_tokens(index, x)[0], (x,))


def test_rows_that_are_none_are_zeros() -> None:
    index = torch.tensor([[2, -1, 0], [-1, -1, 1]])
    wide = normal(2, 4, 3).requires_grad_()
    ids, flags = torch.arange(8).view(2, 4) + 1, torch.ones(2, 4, dtype=torch.bool)
    x, y, z = gather_tokens(index, wide, ids, flags, padded=True)
    assert torch.equal(
        x, torch.stack([wide[0, [2, 0, 0]], wide[1, [0, 0, 1]]]) * (index >= 0)[..., None]
    )
    assert y.tolist() == [[3, 0, 1], [0, 0, 6]]
    assert z.tolist() == [[True, False, True], [False, False, True]]
    x.sum().backward()
    assert wide.grad is not None
    assert wide.grad[..., 0].tolist() == [[1, 0, 1, 0], [0, 1, 0, 0]]


def test_counts_of_topk_that_differ_are_an_index() -> None:
    scores, x = normal(2, 9), normal(2, 9, 3)
    (rows,) = gather_tokens(topk_sorted(scores, [5, 2]), x, padded=True)
    assert torch.equal(rows[1, :2], gather_tokens(topk_sorted(scores[1:], 2), x[1:])[0][0])
    assert rows[1, 2:].abs().sum() == 0


def test_a_row_that_is_not_there_is_refused() -> None:
    with pytest.raises(RuntimeError, match="out of bounds"):
        gather_tokens(torch.tensor([[4]]), normal(1, 4, 3))
    with pytest.raises(RuntimeError, match="out of bounds"):
        gather_tokens(torch.tensor([[-1]]), normal(1, 4, 3))


def test_misfits_are_named() -> None:
    x = normal(2, 4, 3)
    with pytest.raises(InputError, match="float32"):
        gather_tokens(torch.zeros(2, 1), x)
    with pytest.raises(InputError, match="B, K"):
        gather_tokens(torch.zeros(2, dtype=torch.int64), x)
    with pytest.raises(InputError, match="3 rows"):
        gather_tokens(torch.zeros(3, 1, dtype=torch.int64), x)
    with pytest.raises(InputError, match=r"\[2\]"):
        gather_tokens(torch.zeros(2, 1, dtype=torch.int64), x[:, 0, 0])
