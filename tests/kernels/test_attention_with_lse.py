from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from tests.kernels.kernel_inputs import DTYPES, log_sums, naive_attention, normal, relative_error
from vtprune.kernels.attention_with_lse import attention_with_lse
from vtprune.kernels.attn_received import attn_received


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return (
        normal(2, 4, 33, 72, dtype=dtype),
        normal(2, 4, 40, 72, seed=1, dtype=dtype),
        normal(2, 4, 40, 72, seed=2, dtype=dtype),
    )


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_is_what_it_is_and_its_sums_are_seen(dtype: torch.dtype, learns: bool) -> None:
    q, k, v = inputs(dtype)
    q.requires_grad_(learns)
    out, lse = attention_with_lse(lambda: scaled_dot_product_attention(q, k, v), q, k)
    assert torch.equal(out, scaled_dot_product_attention(q, k, v))
    assert out.requires_grad == learns
    assert lse is not None and lse.dtype == torch.float32 and not lse.requires_grad
    assert relative_error(lse, log_sums(q, k).detach()) < 1e-5
    assert relative_error(attn_received(q, k, lse=lse), naive_attention(q, k).detach()) < 1e-5


def test_masked_attention_says_nothing() -> None:
    q, k, v = inputs()
    mask, attend = torch.zeros(33, 40), scaled_dot_product_attention
    assert attention_with_lse(lambda: attend(q, k, v, attn_mask=mask), q, k)[1] is None
    assert attention_with_lse(lambda: attend(q, k, v, attn_mask=mask == 0), q, k)[1] is None
    assert attention_with_lse(lambda: attend(q, k, v, is_causal=True), q, k)[1] is None


def test_attention_in_another_form_says_nothing() -> None:
    q, k, v = inputs()
    with sdpa_kernel(SDPBackend.MATH):
        assert attention_with_lse(lambda: scaled_dot_product_attention(q, k, v), q, k)[1] is None
    assert attention_with_lse(lambda: (q @ k.mT).softmax(-1) @ v, q, k)[1] is None


def test_other_attention_is_not_taken_for_it() -> None:
    q, k, v = inputs()

    def twice() -> Tensor:
        return scaled_dot_product_attention(scaled_dot_product_attention(q, k, v), k, v)

    assert attention_with_lse(twice, q, k)[1] is None
    assert attention_with_lse(lambda: scaled_dot_product_attention(q, k, v), q[1:], k)[1] is None
    assert (
        attention_with_lse(lambda: scaled_dot_product_attention(q, k, v), q, k[:, :, 1:])[1] is None
    )


def test_a_graph_runs_attention_alone() -> None:
    q, k, v = inputs()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = attention_with_lse(lambda: scaled_dot_product_attention(q, k, v), q, k)
        assert lse is None
        return out

    got = torch.compile(attend, fullgraph=True, backend="aot_eager")(q, k, v)
    assert torch.equal(got, scaled_dot_product_attention(q, k, v))
