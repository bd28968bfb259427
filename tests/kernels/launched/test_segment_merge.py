from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels.kernel_inputs import DTYPES, SIZES, normal, relative_error
from tests.kernels.test_segment_merge import edges, naive
from vtprune import kernels
from vtprune.errors import UnsupportedError
from vtprune.kernels.segment_merge import segment_merge

ULP = {torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}
Edges = tuple[Tensor, Tensor, Tensor]


def on(device: str, *tensors: Tensor) -> Edges:
    source, target, weight = (x.to(device) for x in tensors)
    return source, target, weight


def expected(x: Tensor, mix: Edges, n_out: int) -> Tensor:
    with kernels.use("torch"):
        found = segment_merge(x, *mix, n_out)
    kernels.reset_stats()
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", SIZES)
def test_sums_what_is_defined(n: int, dtype: torch.dtype, device: str) -> None:
    mix = edges(2, n, 2 * n + 1, 5)
    x = normal(2, n, 19, dtype=dtype)
    got = segment_merge(x.to(device), *on(device, *mix), 5)
    assert got.dtype == dtype
    error = (got.cpu().double() - naive(x, *mix, 5)).abs()
    assert bool((error <= ULP[dtype] * naive(x, *mix, 5).abs() + 1e-6).all())


@pytest.mark.parametrize("shape", [(2, 9), (2, 9, 1), (2, 9, 300), (2, 9, 3, 5)])
def test_any_width(shape: tuple[int, ...], device: str) -> None:
    x, mix = normal(*shape).to(device), on(device, *edges(2, 9, 20, 3))
    assert relative_error(segment_merge(x, *mix, 3), expected(x, mix, 3)) < 1e-6


def long(device: str) -> Edges:
    """Edges of which some outputs have hundreds, in every place among those of others.

    Outputs 1, 2 and 4 have 600, 257 and 256, others up to 300; two lie outside.
    """
    counts = [(-1, 130), (0, 3), (1, 600), (2, 257), (4, 256), (5, 1), (6, 300), (9, 270)]
    target = torch.cat([torch.full((count,), into) for into, count in counts])
    order = torch.rand(len(target), generator=torch.Generator().manual_seed(3)).argsort()
    target = torch.stack([target[order], (target + 1)[order.flip(0)] % 8])
    source, _, weight = edges(2, 31, target.shape[1], 1)
    return on(device, source, target, weight)


def test_long_sums_are_split(device: str) -> None:
    x, mix = normal(2, 31, 5).to(device), long(device)
    got = segment_merge(x, *mix, 8)
    want = expected(x.double(), (*mix[:2], mix[2].double()), 8)
    for output in range(8):  # 3 has no edge in the first row
        error = (got[:, output] - want[:, output]).abs().max()
        assert error <= 1e-6 * want[:, output].abs().max()


def test_a_sum_is_that_of_its_own_edges_alone(device: str) -> None:
    x, (source, target, weight) = normal(2, 31, 5).to(device), long(device)
    got = segment_merge(x, source, target, weight, 8)
    assert torch.equal(segment_merge(x, source, target, weight, 8), got)
    for output in (0, 1, 6):
        own = torch.where(target == output, target, -1)  # they stand first then, or elsewhere
        alone = segment_merge(x, source, own, weight, 8)
        assert torch.equal(alone[:, output], got[:, output])
    for b in range(2):
        row = (source[b : b + 1], target[b : b + 1], weight[b : b + 1])
        assert torch.equal(segment_merge(x[b : b + 1], *row, 8)[0], got[b])


def test_nan_and_zeros(device: str) -> None:
    x, mix = normal(2, 31, 5).to(device), long(device)
    x[0, 3], x[1, 4, 2], x[:, 5] = float("nan"), float("nan"), -0.0
    got, want = segment_merge(x, *mix, 8), expected(x, mix, 8)
    assert torch.equal(got.isnan(), want.isnan()) and got.isnan().any()
    assert torch.allclose(got, want, rtol=1e-5, atol=1e-5, equal_nan=True)
    minus = torch.full((1, 2, 4), -0.0, device=device)
    one = torch.zeros(1, 1, dtype=torch.int64, device=device)
    got = segment_merge(minus, one, one, torch.ones(1, 1, device=device), 2)
    assert not got.signbit().any()


def test_views_are_read_as_they_lie(device: str) -> None:
    whole, (source, target, weight) = normal(9, 4, 12).to(device), on(device, *edges(2, 9, 20, 3))
    weight = weight.expand(4, 2, 20)[1].half()
    for x in (whole.transpose(0, 1)[1:3, :, 2:9], normal(1, 9, 5).to(device).expand(2, -1, -1)):
        mix = (source.mT.contiguous().mT, target[:1].expand(2, -1), weight)
        assert relative_error(segment_merge(x, *mix, 3), expected(x, mix, 3)) < 1e-6


def test_nothing_to_sum(device: str) -> None:
    none = torch.zeros(2, 0, dtype=torch.int64, device=device)
    x = normal(2, 9, 5).to(device)
    assert torch.equal(segment_merge(x, none, none, none.float(), 3), torch.zeros_like(x[:, :3]))
    assert segment_merge(x, none, none, none.float(), 0).shape == (2, 0, 5)


def gradients(backend: kernels.Backend, x: Tensor, mix: Edges, n_out: int) -> list[Tensor]:
    x, weight = x.clone().requires_grad_(), mix[2].clone().requires_grad_()
    with kernels.use(backend):
        made = segment_merge(x, mix[0], mix[1], weight, n_out)
        found = torch.autograd.grad((made.float() ** 3).sum(), (x, weight))
    kernels.reset_stats()
    return list(found)


@pytest.mark.parametrize("shape", [(2, 9), (2, 9, 2, 3)])
def test_gradients_of_tokens_and_weights(shape: tuple[int, ...], device: str) -> None:
    source, target, weight = on(device, *edges(2, 9, 40, 7))
    x, mix = normal(*shape).to(device), (source, target - 1, weight)  # some to -1, and to 5
    pairs = zip(gradients("triton", x, mix, 5), gradients("torch", x, mix, 5), strict=True)
    for got, want in pairs:
        assert relative_error(got, want) < 2e-6


def test_gradients_of_long_sums(device: str) -> None:
    x, mix = normal(2, 31, 5).to(device), long(device)
    first, again, want = (gradients(by, x, mix, 8) for by in ("triton", "triton", "torch"))
    for i in range(2):
        assert relative_error(first[i], want[i]) < 2e-6
        assert torch.equal(again[i], first[i])


def test_gradients_of_16_bits_keep_their_dtype(device: str) -> None:
    x, mix = normal(2, 31, 5).half().to(device), on(device, *edges(2, 31, 40, 6))
    dx, dweight = gradients("triton", x, mix, 6)
    want = gradients("torch", x.float(), mix, 6)
    assert dx.dtype == torch.float16 and dweight.dtype == torch.float32
    assert relative_error(dx, want[0]) < 4e-3 and relative_error(dweight, want[1]) < 4e-3


def test_a_graph_holds_the_kernel(device: str) -> None:
    x, mix = normal(2, 9, 5).to(device).requires_grad_(), on(device, *edges(2, 9, 20, 3))

    def merge(x: Tensor, *mix: Tensor) -> Tensor:
        return 2 * segment_merge(x, mix[0], mix[1], mix[2], 3)

    got = torch.compile(merge, fullgraph=True, backend="aot_eager")(x, *mix)
    assert kernels.stats() == {("segment_merge", "triton"): 1}
    got.sum().backward()
    assert relative_error(got.detach(), 2 * expected(x.detach(), mix, 3)) < 1e-6
    want = torch.zeros(2, 9, device=device).scatter_add(1, mix[0], 2 * mix[2])
    assert x.grad is not None and relative_error(x.grad, want[..., None].expand_as(x)) < 1e-6


def test_the_custom_operation_says_what_it_makes(device: str) -> None:
    x, (source, target, weight) = normal(2, 9, 5).to(device), on(device, *edges(2, 9, 20, 3))
    operation = torch.ops.vtprune.segment_merge.default
    torch.library.opcheck(operation, (x, source, target, weight, 3))
    x, weight = x.requires_grad_(), weight.requires_grad_()
    torch.library.opcheck(operation, (x, source, target, weight, 3))


def test_what_the_kernel_does_not_take_is_said(device: str) -> None:
    x, mix = normal(2, 9, 5).double().to(device), on(device, *edges(2, 9, 20, 3))
    with pytest.raises(UnsupportedError, match=r"no kernel for this call: x is float64.*use"):
        segment_merge(x, *mix, 3)
