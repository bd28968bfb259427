from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels.kernel_inputs import DTYPES, SIZES, normal, relative_error
from vtprune import kernels
from vtprune.errors import UnsupportedError
from vtprune.kernels import _dispatch
from vtprune.kernels.gather_tokens import gather_tokens


def stage(rows: int, n: int, device: str) -> list[Tensor]:
    """What is gathered together: of many dtypes and widths, some of them views."""
    made = [
        normal(rows, n, 40),
        normal(rows, n, 1200, dtype=torch.bfloat16),  # more than a program's words
        normal(1, n, 6, dtype=torch.float16).expand(rows, n, 6),
        torch.arange(rows * n).view(rows, n),
        torch.arange(rows * n).view(rows, n) % 3 == 0,
        normal(rows, n, 3, 8)[..., 1:4],
        normal(rows, n + 2, 7)[:, 1:-1],
        normal(rows, n, 7)[..., :6],  # rows of whole words, that lie at parts of words
        normal(rows, 7, n).mT,
    ]
    made[0][:, 0], made[1][:, 0] = -0.0, float("nan")
    return [x.to(device) for x in made]


def places(rows: int, n: int, k: int, device: str, least: int = -1) -> Tensor:
    generator = torch.Generator().manual_seed(n)
    return torch.randint(least, n, (rows, k), generator=generator).to(device)


def bits(x: Tensor) -> Tensor:
    """The bytes, with one NaN for all that there are: torch does not keep which it was."""
    return x.masked_fill(x.isnan(), 7).contiguous().view(torch.uint8)


def expected(index: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    with kernels.use("torch"):
        found = gather_tokens(index, *tensors, padded=True)
    kernels.reset_stats()
    return found


def same(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> bool:
    pairs = zip(got, want, strict=True)
    return all(x.dtype == y.dtype and torch.equal(bits(x), bits(y)) for x, y in pairs)


@pytest.mark.parametrize("n", SIZES)
def test_copies_what_torch_copies(n: int, device: str) -> None:
    tensors = stage(2, n, device)
    for k in {1, n, 37}:
        index = places(2, n, k, device)
        assert same(gather_tokens(index, *tensors, padded=True), expected(index, *tensors))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64, torch.int8, torch.float8_e4m3fn])
def test_any_dtype_and_alignment(dtype: torch.dtype, device: str) -> None:
    whole = torch.arange(2 * 9 * 6 + 5).to(device, dtype)
    for first in range(3):
        x = whole[first : first + 108].view(2, 9, 6)
        index = places(2, 9, 5, device, least=0)
        want = x.view(torch.uint8).view(2, 9, -1)[torch.arange(2)[:, None], index]
        (got,) = gather_tokens(index, x, padded=True)
        assert torch.equal(got.view(torch.uint8).view(want.shape), want)


def test_an_index_of_any_form(device: str) -> None:
    x = normal(3, 9, 4).to(device)
    index = places(3, 9, 8, device)
    for form in (index.int(), index[:, ::2], index[:1].expand(3, -1), index.mT.contiguous().mT):
        assert same(gather_tokens(form, x, padded=True), expected(form, x))


def test_rows_outside_are_not_read(device: str) -> None:
    (got,) = gather_tokens(
        torch.tensor([[9, -7, 1]], device=device), normal(1, 9, 4).to(device), padded=True
    )
    assert torch.equal(got[0, :2], torch.zeros(2, 4, device=device))


def test_nothing_to_copy(device: str) -> None:
    x = normal(2, 9, 4).to(device)
    none = torch.zeros(2, 0, dtype=torch.int64, device=device)
    assert gather_tokens(none, x, padded=True)[0].shape == (2, 0, 4)
    wide, empty = gather_tokens(places(2, 9, 3, device), x, x[..., :0], padded=True)
    assert wide.shape == (2, 3, 4) and empty.shape == (2, 3, 0)


def test_gradients_of_rows_that_repeat(device: str) -> None:
    ids = torch.arange(18, device=device).view(2, 9)
    index = torch.tensor([[0, 4, 4, -1, 4], [8, 8, 1, 0, -1]], device=device)
    found: list[list[Tensor]] = []
    for backend in ("torch", "triton"):
        wide = normal(2, 9, 5).to(device).requires_grad_()
        half = normal(2, 9, 3, 2).half().to(device).requires_grad_()
        with kernels.use(backend):
            x, y, _, _ = gather_tokens(index, wide, half, ids, wide.detach(), padded=True)
            ((x**3).sum() + (y.float() ** 2).sum()).backward()
        found.append([x for x in (wide.grad, half.grad) if x is not None])
        kernels.reset_stats()
    for want, got in zip(*found, strict=True):
        assert got.dtype == want.dtype
        assert relative_error(got, want) < (1e-6 if got.dtype == torch.float32 else 2e-3)


def test_gradients_of_gradients(device: str) -> None:
    index = torch.tensor([[0, 2, 2, -1]], device=device)
    x = normal(1, 3, 2).to(device).requires_grad_()
    (dx,) = torch.autograd.grad(
        (gather_tokens(index, x, padded=True)[0] ** 3).sum(), x, create_graph=True
    )
    (again,) = torch.autograd.grad(dx.sum(), x)
    count = torch.tensor([1.0, 0.0, 2.0], device=device)[None, :, None]
    assert torch.allclose(again, 6 * x * count)


def test_a_graph_holds_the_kernel(device: str) -> None:
    index, x = places(2, 9, 4, device), normal(2, 9, 3).to(device).requires_grad_()
    ids = torch.arange(18, device=device).view(2, 9)

    def keep(index: Tensor, x: Tensor, ids: Tensor) -> Tensor:
        wide, few = gather_tokens(index, x, ids, padded=True)
        return wide * few[..., None]

    got = torch.compile(keep, fullgraph=True, backend="aot_eager")(index, x, ids)
    assert kernels.stats() == {("gather_tokens", "triton"): 1}
    wide, few = expected(index, x.detach(), ids)
    assert torch.equal(got, wide * few[..., None])
    got.sum().backward()
    times = torch.zeros(2, 10, device=device, dtype=torch.int64)
    times = times.scatter_add(1, torch.where(index < 0, 9, index), few)[:, :9]
    assert x.grad is not None and torch.equal(x.grad, times[..., None].expand_as(x).float())


def test_the_custom_operation_says_what_it_makes(device: str) -> None:
    index, x = places(2, 9, 4, device), normal(2, 9, 3).to(device)
    ids = torch.arange(18, device=device).view(2, 9)
    operation = torch.ops.vtprune.gather_tokens.default
    torch.library.opcheck(operation, (index, [x, ids]))
    torch.library.opcheck(operation, (index, [x.clone().requires_grad_(), ids]))


def test_what_the_kernel_does_not_take_is_said(device: str) -> None:
    index, x = places(2, 9, 4, device), normal(2, 9, 3).to(device)
    for tensors, reason in (
        ([x, x[:, :5]], "9 and 5 rows"),
        ([x.to(torch.complex64)], "complex64"),
        ([x.double().requires_grad_()], "gradients"),
    ):
        with pytest.raises(UnsupportedError, match=f"no kernel for this call: .*{reason}.*use"):
            gather_tokens(index, *tensors, padded=True)


def test_one_tensor_stays_with_torch_unless_it_learns(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_dispatch, "DEVICES", (device,))
    index, x = places(2, 9, 4, device), normal(2, 9, 3).to(device)
    with kernels.use("auto"):
        gather_tokens(index, x, padded=True)
        assert kernels.stats() == {("gather_tokens", "torch"): 1}
        kernels.reset_stats()
        gather_tokens(index, x, x, padded=True)
        gather_tokens(index, x.requires_grad_(), padded=True)
    assert kernels.stats() == {("gather_tokens", "triton"): 2}
