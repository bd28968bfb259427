from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels.kernel_inputs import SIZES, normal
from tests.kernels.launched.test_gather_tokens import same, stage
from vtprune import kernels
from vtprune.errors import UnsupportedError
from vtprune.kernels.gather_tokens import gather_tokens
from vtprune.kernels.scatter_tokens import scatter_tokens


def unique(rows: int, n: int, k: int, device: str) -> Tensor:
    """Places without repeats, in no order; -1 where there are more than ``n``, and in between."""
    generator = torch.Generator().manual_seed(n)
    order = torch.rand(rows, max(n, k), generator=generator).argsort(1)[:, :k]
    return order.masked_fill((order >= n) | (order % 5 == 3), -1).to(device)


def expected(index: Tensor, *pairs: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    with kernels.use("torch"):
        found = scatter_tokens(index, *pairs)
    kernels.reset_stats()
    return found


@pytest.mark.parametrize("n", SIZES)
def test_writes_what_torch_writes(n: int, device: str) -> None:
    into = stage(2, n, device)
    for k in {1, n, 37}:
        pairs = list(zip(stage(2, k, device), into, strict=True))
        index = unique(2, n, k, device)
        before = [x.clone() for x in into]
        assert same(scatter_tokens(index, *pairs), expected(index, *pairs))
        assert same(tuple(into), tuple(before))


def test_long_rows_and_many_places(device: str) -> None:
    index = unique(1, 3000, 2500, device)
    x, y = normal(1, 2500, 1).to(device), normal(1, 3000, 1).to(device)
    assert same(scatter_tokens(index, (x, y)), expected(index, (x, y)))


def test_rows_whose_bytes_lie_otherwise_than_those_they_go_into(device: str) -> None:
    index = unique(2, 9, 4, device)
    x = normal(2, 4, 9, dtype=torch.float16).to(device)[..., 1:7]
    y = normal(2, 9, 8, dtype=torch.float16).to(device)[..., 2:]
    assert same(scatter_tokens(index.int(), (x, y)), expected(index, (x, y)))


def test_nothing_to_write(device: str) -> None:
    y, none = normal(2, 9, 4).to(device), torch.zeros(2, 0, dtype=torch.int64, device=device)
    (got,) = scatter_tokens(none, (y[:, :0], y))
    assert torch.equal(got, y) and got.data_ptr() != y.data_ptr()


def test_undoes_a_gather(device: str) -> None:
    index, x = unique(2, 9, 6, device), normal(2, 9, 4).to(device)
    (rows,) = gather_tokens(index, x)
    assert torch.equal(scatter_tokens(index, (rows, x))[0], x)


def test_gradients_of_rows_and_of_what_they_go_into(device: str) -> None:
    index, ids = unique(2, 9, 4, device), torch.arange(18, device=device).view(2, 9)
    found: list[list[Tensor | None]] = []
    for backend in ("torch", "triton"):
        inputs = [x.to(device).requires_grad_() for x in (normal(2, 4, 3), normal(2, 9, 3))]
        with kernels.use(backend):
            made, _ = scatter_tokens(index, (inputs[0], inputs[1]), (ids[:, :4], ids))
            (made**3).sum().backward()
        found.append([x.grad for x in inputs])
        kernels.reset_stats()
    for want, got in zip(*found, strict=True):
        assert want is not None and got is not None and torch.equal(got, want)


def test_a_graph_holds_the_kernel(device: str) -> None:
    index, x = unique(2, 9, 4, device), normal(2, 4, 3).to(device).requires_grad_()
    y, ids = normal(2, 9, 3).to(device), torch.arange(18, device=device).view(2, 9)

    def put(index: Tensor, x: Tensor, y: Tensor, ids: Tensor) -> Tensor:
        made, few = scatter_tokens(index, (x, y), (ids[:, 5:], ids))
        return made * few[..., None]

    got = torch.compile(put, fullgraph=True, backend="aot_eager")(index, x, y, ids)
    assert kernels.stats() == {("scatter_tokens", "triton"): 1}
    made, few = expected(index, (x.detach(), y), (ids[:, 5:], ids))
    assert torch.equal(got, made * few[..., None])
    got.sum().backward()
    there = (index >= 0)[..., None]
    assert x.grad is not None and torch.equal(x.grad, (ids[:, 5:, None] * there).expand_as(x) * 1.0)


def test_the_custom_operation_says_what_it_makes(device: str) -> None:
    index, x, y = unique(2, 9, 4, device), normal(2, 4, 3).to(device), normal(2, 9, 3).to(device)
    ids = torch.arange(18, device=device).view(2, 9)
    operation = torch.ops.vtprune.scatter_tokens.default
    torch.library.opcheck(operation, (index, [x, ids[:, :4]], [y, ids]))
    learns = x.clone().requires_grad_()
    torch.library.opcheck(operation, (index, [learns, ids[:, :4]], [y, ids]))


def test_what_the_kernel_does_not_take_is_said(device: str) -> None:
    index, y = unique(2, 9, 4, device), normal(2, 9, 3).to(device)
    pairs = [(x[:, :4], x) for x in (y, torch.cat([y, y], dim=1))]
    with pytest.raises(UnsupportedError, match=r"no kernel for this call: .*9 and 18 rows.*use"):
        scatter_tokens(index, *pairs)
