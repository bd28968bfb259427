from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels.kernel_inputs import (
    DTYPES,
    drawn_levels,
    naive_pyramid,
    normal,
    relative_error,
)
from vtprune import kernels
from vtprune.errors import UnsupportedError
from vtprune.kernels.psa_attention import psa_attention


def inputs(
    batch: int,
    heads: tuple[int, int],
    n: int,
    d: int,
    device: str,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of so many heads."""
    q, k, v = (
        normal(batch, heads[at > 0], n, d, seed=at, dtype=dtype).to(device) for at in range(3)
    )
    return q, k, v


def close(got: Tensor, want: Tensor) -> bool:
    """Whether they are as near as rounding of the result explains."""
    limit = 1e-5 if got.dtype == torch.float32 else torch.finfo(got.dtype).eps
    return relative_error(got.cpu(), want.cpu()) < limit


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 7, 32, 33, 75])
def test_matches_the_definition(n: int, dtype: torch.dtype, device: str) -> None:
    q, k, v = inputs(2, (2, 1), n, 16, device, dtype)
    blocks = -(-n // 16)
    levels = drawn_levels(2, 2, blocks, blocks, seed=n, whole=n in (1, 32)).to(device)
    got = psa_attention(q, k, v, levels, 16)
    assert got.shape == q.shape and got.dtype == dtype
    assert close(got, naive_pyramid(q, k, v, levels, 16))


@pytest.mark.parametrize("d", [8, 24, 64, 65, 72, 80, 96, 128])
def test_heads_of_any_width(d: int, device: str) -> None:
    q, k, v = inputs(1, (1, 1), 40, d, device)
    levels = drawn_levels(1, 1, 3, 3, seed=d).to(device)
    assert close(psa_attention(q, k, v, levels, 16), naive_pyramid(q, k, v, levels, 16))


@pytest.mark.parametrize("block", [8, 24, 40, 64])
def test_blocks_of_any_size(block: int, device: str) -> None:
    n = 2 * block + 5
    q, k, v = inputs(1, (1, 1), n, 8, device)
    for seed in (0, 1):
        levels = drawn_levels(1, 1, 3, 3, seed=seed).to(device)
        want = torch_form(q, k, v, levels, block)
        assert close(psa_attention(q, k, v, levels, block), want)


def torch_form(q: Tensor, k: Tensor, v: Tensor, levels: Tensor, block: int) -> Tensor:
    """The form in torch, in float64."""
    from vtprune.kernels.psa_attention import _reference

    return _reference(q.double(), k.double(), v.double(), levels, block, q.shape[-1] ** -0.5)


@pytest.mark.parametrize("heads", [(7, 1), (6, 2)])
def test_heads_share_keys(heads: tuple[int, int], device: str) -> None:
    q, k, v = inputs(2, heads, 20, 16, device)
    levels = drawn_levels(2, heads[0], 2, 2).to(device)
    got = psa_attention(q, k, v, levels, 16)
    k, v = (x.repeat_interleave(heads[0] // heads[1], 1) for x in (k, v))
    assert torch.equal(got, psa_attention(q, k, v, levels, 16))
    assert close(got, naive_pyramid(q, k, v, levels, 16))


def test_layout_does_not_matter(device: str) -> None:
    qkv = normal(2, 40, 3, 4, 16).to(device)  # [B, N, 3, H, d], fused
    q, k, v = (qkv[:, :, at].transpose(1, 2)[:, 2:] for at in range(3))
    levels = drawn_levels(2, 2, 3, 3).to(device)
    want = psa_attention(q.contiguous(), k.contiguous(), v.contiguous(), levels, 16)
    assert torch.equal(psa_attention(q, k, v, levels, 16), want)
    q, levels = q.mT.contiguous().mT, levels.mT.contiguous().mT
    assert torch.equal(psa_attention(q, k, v, levels.to(torch.uint8), 16), want)


def test_scale_is_applied_and_large_logits_do_not_overflow(device: str) -> None:
    q, k, v = inputs(1, (2, 2), 40, 16, device)
    levels = drawn_levels(1, 2, 3, 3).to(device)
    for scale in (0.5, -0.5, 12.5):
        want = naive_pyramid(q, k, v, levels, 16, scale)
        assert close(psa_attention(q, k, v, levels, 16, scale), want)


def test_what_is_not_seen_is_not_touched(device: str) -> None:
    q, k, v = inputs(1, (1, 1), 48, 16, device)
    levels = torch.tensor([[[[1, 8, 4], [1, 1, 2], [1, 0, 1]]]], device=device)
    want = psa_attention(q, k, v, levels, 16)
    k[:, :, 16:32], v[:, :, 16:32] = float("nan"), float("nan")
    got = psa_attention(q, k, v, levels, 16)
    assert torch.equal(got[:, :, :16], want[:, :, :16])
    assert torch.equal(got[:, :, 32:], want[:, :, 32:])
    assert bool(got[:, :, 16:32].isnan().all())
    nothing = psa_attention(q, k, v, torch.zeros_like(levels), 16)
    assert bool((nothing == 0).all())


def test_a_row_is_the_same_alone_and_in_a_batch(device: str) -> None:
    q, k, v = inputs(3, (2, 1), 33, 16, device)
    levels = drawn_levels(3, 2, 3, 3).to(device)
    alone = psa_attention(q[2:], k[2:], v[2:], levels[2:], 16)
    assert torch.equal(psa_attention(q, k, v, levels, 16)[2:], alone)


def test_a_graph_holds_the_kernel(device: str) -> None:
    q, k, v = inputs(1, (2, 1), 20, 16, device)
    levels = drawn_levels(1, 2, 2, 2).to(device)

    def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return psa_attention(q, k, v, levels, 16) * 2

    got = torch.compile(attended, fullgraph=True, backend="aot_eager")(q, k, v)
    assert kernels.stats() == {("psa_attention", "triton"): 1}
    assert torch.equal(got, 2 * psa_attention(q, k, v, levels, 16))


def test_the_custom_operation_says_what_it_makes(device: str) -> None:
    q, k, v = inputs(1, (2, 1), 20, 16, device)
    args = (q, k, v, drawn_levels(1, 2, 2, 2).to(device), 16, 0.25)
    torch.library.opcheck(torch.ops.vtprune.psa_attention.default, args)


def test_what_the_kernel_does_not_take_is_said(device: str) -> None:
    x = torch.zeros(1, 1, 9, 16, device=device)
    levels = torch.ones(1, 1, 1, 1, device=device, dtype=torch.int64)
    cases = (
        ((x.double(), x.double(), x.double()), "q or k is float64"),
        ((x, x, x.half()), "v is torch.float16, but k is torch.float32"),
        ((x.half(), x, x), "q is torch.float16, but k is torch.float32"),
        ((x.repeat(1, 1, 1, 9), x.repeat(1, 1, 1, 9), x.repeat(1, 1, 1, 9)), "heads are 144 wide"),
        ((x.clone().requires_grad_(), x, x), "gradients are wanted"),
    )
    for (q, k, v), why in cases:
        with pytest.raises(UnsupportedError, match=f"no kernel for this call: {why}"):
            psa_attention(q, k, v, levels, 16)
