from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels.kernel_inputs import DTYPES, SIZES, earlier, naive_attention, normal
from tests.kernels.launched.test_attn_received import close, inputs
from vtprune import kernels
from vtprune.errors import UnsupportedError
from vtprune.kernels.attn_rows import attn_rows


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", SIZES)
def test_matches_the_definition(n: int, dtype: torch.dtype, device: str) -> None:
    q, k = inputs(2, (4, 2), 1, n, 16, device, dtype)
    got = attn_rows(q, k)
    assert got.shape == (2, n) and got.dtype == torch.float32
    assert close(got, naive_attention(q, k), dtype)


@pytest.mark.parametrize("d", [8, 24, 64, 65, 72, 80, 96, 128])
def test_heads_of_any_width(d: int, device: str) -> None:
    q, k = inputs(1, (2, 1), 3, 70, d, device)
    assert close(attn_rows(q, k), naive_attention(q, k))


@pytest.mark.parametrize("heads", [(1, 1), (7, 1), (28, 4), (6, 2)])
@pytest.mark.parametrize("m", [1, 5, 13])
def test_heads_that_share_keys_go_together(heads: tuple[int, int], m: int, device: str) -> None:
    q, k = inputs(1, heads, m, 70, 16, device)
    assert close(attn_rows(q, k), naive_attention(q, k))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_of_the_keys_are_joined(dtype: torch.dtype, device: str) -> None:
    q, k = inputs(1, (2, 1), 3, 300, 16, device, dtype)
    k[:, :, 200:] *= 20.0  # the first parts are nothing next to the last
    assert close(attn_rows(q, k), naive_attention(q, k), dtype)


@pytest.mark.parametrize(("m", "n"), [(1, 1), (5, 9), (20, 70)])
def test_a_query_sees_what_it_may(m: int, n: int, device: str) -> None:
    q, k = inputs(2, (4, 2), m, n, 16, device)
    some = normal(m, n) > 0
    some[:, n // 2] = True
    for seen in (earlier(m, n), some, some.mT.contiguous().mT):
        seen = seen.to(device)
        assert close(attn_rows(q, k, seen=seen), naive_attention(q, k, seen=seen))
    assert torch.equal(attn_rows(q, k, seen=torch.ones_like(seen)), attn_rows(q, k))


def test_a_query_that_sees_nothing_gives_nan_as_in_torch(device: str) -> None:
    q, k = inputs(2, (2, 1), 3, 70, 16, device)
    seen = torch.ones(3, 70, dtype=torch.bool, device=device)
    seen[1] = False
    assert bool(attn_rows(q, k, seen=seen).isnan().all())


def test_layout_does_not_matter(device: str) -> None:
    qkv = normal(2, 9, 3, 4, 16, dtype=torch.bfloat16).to(device)  # [B, N, 3, H, d], fused
    q, k = qkv[:, :, 0].transpose(1, 2)[:, :, :1], qkv[:, :, 1].transpose(1, 2)
    want = attn_rows(q.contiguous(), k.contiguous())
    assert torch.equal(attn_rows(q, k), want)
    assert torch.equal(attn_rows(q.mT.contiguous().mT, k.mT.contiguous().mT), want)


def test_scale_is_applied_and_large_logits_do_not_overflow(device: str) -> None:
    q, k = inputs(2, (2, 2), 3, 70, 16, device)
    for scale in (0.5, -0.5, 12.5):
        assert close(attn_rows(q, k, scale=scale), naive_attention(q, k, scale))


def test_a_row_with_nan_does_not_touch_the_others(device: str) -> None:
    q, k = inputs(3, (2, 1), 2, 70, 16, device)
    q[0, 0, 1, 0], k[1, 0, 69, 2] = float("nan"), float("nan")
    got = attn_rows(q, k)
    assert bool(got[:2].isnan().all())
    assert close(got[2:], naive_attention(q, k)[2:])
    assert torch.equal(got[2:], attn_rows(q[2:], k[2:]))


def test_a_graph_holds_the_kernel(device: str) -> None:
    q, k = inputs(1, (2, 1), 1, 9, 16, device)

    def rows(q: Tensor, k: Tensor) -> Tensor:
        return attn_rows(q, k) * 2

    got = torch.compile(rows, fullgraph=True, backend="aot_eager")(q, k)
    assert kernels.stats() == {("attn_rows", "triton"): 1}
    assert torch.equal(got, 2 * attn_rows(q, k))


def test_the_custom_operation_says_what_it_makes(device: str) -> None:
    q, k = inputs(1, (2, 1), 3, 9, 16, device)
    for seen in (None, earlier(3, 9).to(device)):
        torch.library.opcheck(torch.ops.vtprune.attn_rows.default, (q, k, 0.25, seen))


def test_what_the_kernel_does_not_take_is_said(device: str) -> None:
    x = torch.zeros(1, 1, 9, 16, device=device)
    with pytest.raises(UnsupportedError, match=r"no kernel for this call: q or k is float64.*use"):
        attn_rows(x.double(), x.double())
