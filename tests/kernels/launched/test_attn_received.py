from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels.kernel_inputs import (
    DTYPES,
    SIZES,
    earlier,
    log_sums,
    naive_attention,
    normal,
    relative_error,
)
from vtprune import kernels
from vtprune.errors import UnsupportedError
from vtprune.kernels.attn_received import attn_received


def inputs(
    batch: int,
    heads: tuple[int, int],
    m: int,
    n: int,
    d: int,
    device: str,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[Tensor, Tensor]:
    """Queries and keys of so many heads each."""
    q = normal(batch, heads[0], m, d, dtype=dtype)
    return q.to(device), normal(batch, heads[1], n, d, seed=1, dtype=dtype).to(device)


def close(got: Tensor, want: Tensor, dtype: torch.dtype = torch.bfloat16) -> bool:
    """Whether they are as near as products of ``dtype`` allow."""
    tensor_cores = got.is_cuda and dtype != torch.float32
    return relative_error(got.cpu(), want.cpu()) < (1e-4 if tensor_cores else 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", SIZES)
def test_matches_the_definition(n: int, dtype: torch.dtype, device: str) -> None:
    q, k = inputs(2, (2, 1), n, n, 16, device, dtype)
    got = attn_received(q, k)
    assert got.shape == (2, n) and got.dtype == torch.float32
    assert close(got, naive_attention(q, k), dtype)


@pytest.mark.parametrize("d", [8, 24, 64, 65, 72, 80, 96, 128])
def test_heads_of_any_width(d: int, device: str) -> None:
    q, k = inputs(1, (1, 1), 33, 70, d, device)
    assert close(attn_received(q, k), naive_attention(q, k))


@pytest.mark.parametrize("heads", [(7, 1), (4, 2)])
def test_heads_share_keys(heads: tuple[int, int], device: str) -> None:
    q, k = inputs(2, heads, 9, 17, 16, device)
    got = attn_received(q, k)
    assert close(got, naive_attention(q, k))
    assert torch.equal(got, attn_received(q, k.repeat_interleave(heads[0] // heads[1], 1)))


@pytest.mark.parametrize(("m", "n"), [(1, 1), (9, 9), (130, 130), (65, 130), (2, 129)])
def test_queries_see_earlier_keys(m: int, n: int, device: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        q, k = inputs(1, (2, 1), m, n, 16, device, dtype)
        want = naive_attention(q, k, seen=earlier(m, n).to(device))
        assert close(attn_received(q, k, causal=True), want, dtype)


@pytest.mark.parametrize("causal", [False, True])
def test_packed_sequences_are_as_each_alone(causal: bool, device: str) -> None:
    lengths = [1, 70, 8, 51]
    q, k = inputs(1, (2, 1), 130, 130, 16, device)
    got = attn_received(q, k, lengths=lengths, causal=causal)
    parts = list(zip(q.split(lengths, 2), k.split(lengths, 2), strict=True))
    assert torch.equal(got, torch.cat([attn_received(*x, causal=causal) for x in parts], 1))
    if not causal:
        lse = torch.cat([log_sums(*x) for x in parts], 2)
        assert close(attn_received(q, k, lengths=lengths, lse=lse.float()), got)


def test_known_sums_take_the_place_of_the_first_pass(device: str) -> None:
    q, k = inputs(2, (4, 2), 65, 70, 16, device)
    lse = log_sums(q, k).float()
    assert close(attn_received(q, k, lse=lse), naive_attention(q, k))
    view = (lse + 1).mT.contiguous().mT
    assert close(attn_received(q, k, lse=view), naive_attention(q, k) / math.e)


def test_layout_does_not_matter(device: str) -> None:
    qkv = normal(2, 9, 3, 4, 16, dtype=torch.bfloat16).to(device)  # [B, N, 3, H, d], fused
    q, k = qkv[:, :, 0].transpose(1, 2)[:, :, 2:], qkv[:, :, 1].transpose(1, 2)
    want = attn_received(q.contiguous(), k.contiguous())
    assert torch.equal(attn_received(q, k), want)
    assert torch.equal(attn_received(q.mT.contiguous().mT, k.mT.contiguous().mT), want)


def test_scale_is_applied_and_large_logits_do_not_overflow(device: str) -> None:
    q, k = inputs(2, (2, 2), 9, 40, 16, device)
    for scale in (0.5, -0.5, 12.5):
        assert close(attn_received(q, k, scale=scale), naive_attention(q, k, scale))


def test_a_row_is_the_same_alone_and_in_a_batch(device: str) -> None:
    q, k = inputs(3, (2, 1), 33, 33, 16, device)
    assert torch.equal(attn_received(q, k)[2:], attn_received(q[2:], k[2:]))
    q[0, 0, 3, 0], k[1, 0, 5, 2] = float("nan"), float("nan")
    got = attn_received(q, k)
    assert bool(got[:2].isnan().all())
    assert close(got[2:], naive_attention(q, k)[2:])


def test_equal_keys_get_equal_shares(device: str) -> None:
    q, k = inputs(1, (2, 1), 40, 40, 16, device)
    got = attn_received(q, torch.zeros_like(k) * -1.0)
    assert bool((got == got[0, 0]).all()) and close(got, torch.full((1, 40), 1 / 40))


class _Made(TorchDispatchMode):
    """Counts the numbers in the tensors that are made."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        made = func._schema.name in ("aten::empty", "aten::mean")
        self.count += out.numel() if made else 0
        return out


@pytest.mark.parametrize("n", [65, 130])
def test_memory_grows_with_the_keys_alone(n: int, device: str) -> None:
    q, k = inputs(1, (2, 1), n, n, 16, device)
    with _Made() as made:
        attn_received(q, k)
    assert made.count == 2 * n + 2 * n + n  # sums of queries and means of keys per head; the mean


def test_a_graph_holds_the_kernel(device: str) -> None:
    q, k = inputs(1, (2, 1), 9, 9, 16, device)

    def received(q: Tensor, k: Tensor) -> Tensor:
        return attn_received(q, k, lengths=[4, 5]) * 2

    got = torch.compile(received, fullgraph=True, backend="aot_eager")(q, k)
    assert kernels.stats() == {("attn_received", "triton"): 1}
    assert torch.equal(got, 2 * attn_received(q, k, lengths=[4, 5]))


def test_gradients_end_at_it(device: str) -> None:
    q, k = inputs(1, (2, 1), 9, 9, 16, device)
    assert not attn_received(q.requires_grad_(), k).requires_grad


def test_the_custom_operation_says_what_it_makes(device: str) -> None:
    q, k = inputs(1, (2, 1), 9, 9, 16, device)
    lse = log_sums(q, k).float()
    for args in ((0.25, False, lse, None), (0.25, True, None, [4, 5])):
        torch.library.opcheck(torch.ops.vtprune.attn_received.default, (q, k, *args))


def test_what_the_kernel_does_not_take_is_said(device: str) -> None:
    x = torch.zeros(1, 1, 9, 16, device=device)
    with pytest.raises(UnsupportedError, match=r"no kernel for this call: q or k is float64.*use"):
        attn_received(x.double(), x.double())
    with pytest.raises(UnsupportedError, match=r"q is torch.float16, but k is torch.float32"):
        attn_received(x.half(), x)
    with pytest.raises(UnsupportedError, match=r"heads are 144 wide, and it takes 128 at most"):
        attn_received(x.repeat(1, 1, 1, 9), x.repeat(1, 1, 1, 9))
