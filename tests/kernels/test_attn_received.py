from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels.kernel_inputs import DTYPES, SIZES, naive_attention, normal, relative_error
from vtprune.errors import InputError
from vtprune.kernels.attn_received import attn_received


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize(("batch", "heads", "shared"), [(1, 1, 1), (3, 4, 2), (3, 7, 1)])
def test_matches_the_definition(n: int, batch: int, heads: int, shared: int) -> None:
    q, k = normal(batch, heads, n, 16), normal(batch, shared, n, 16, seed=1)
    got = attn_received(q, k)
    assert got.shape == (batch, n)
    assert got.dtype == torch.float32
    assert relative_error(got, naive_attention(q, k)) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
def test_narrow_inputs_are_computed_in_float32(dtype: torch.dtype) -> None:
    q, k = normal(3, 4, 65, 80, dtype=dtype), normal(3, 4, 65, 80, seed=1, dtype=dtype)
    assert relative_error(attn_received(q, k), naive_attention(q, k)) < 1e-5


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(1, 4),
    n=st.integers(1, 20),
    shared=st.sampled_from([1, 2]),
    chunk_bytes=st.integers(1, 20_000),
)
def test_the_memory_limit_changes_nothing(
    batch: int, n: int, shared: int, chunk_bytes: int
) -> None:
    q, k = normal(batch, 4, n, 8), normal(batch, shared, n, 8, seed=1)
    got = attn_received(q, k, chunk_bytes=chunk_bytes)
    assert relative_error(got, naive_attention(q, k)) < 1e-5
    assert torch.allclose(got.sum(1), torch.ones(batch), atol=1e-5)


class _Largest(TorchDispatchMode):
    """Remembers the bytes of the largest tensor made."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.bytes = max(self.bytes, out.numel() * out.element_size())
        return out


@pytest.mark.parametrize("batch", [1, 3])
def test_no_tensor_exceeds_the_memory_limit(batch: int) -> None:
    q, k = normal(batch, 4, 200, 8), normal(batch, 4, 200, 8, seed=1)
    limit = 64_000  # one row's matrix takes 640 000 bytes
    with _Largest() as largest:
        attn_received(q, k, chunk_bytes=limit)
    assert largest.bytes <= limit


def test_a_row_is_the_same_alone_and_in_a_batch() -> None:
    q, k = normal(5, 2, 33, 8), normal(5, 2, 33, 8, seed=1)
    for limit in (1, 10_000, 1 << 20):
        together = attn_received(q, k, chunk_bytes=limit)
        alone = attn_received(q[3:4], k[3:4], chunk_bytes=limit)
        assert relative_error(together[3:4], alone) < 1e-6


def test_a_row_with_nan_does_not_touch_the_others() -> None:
    q, k = normal(2, 2, 9, 8), normal(2, 2, 9, 8, seed=1)
    q[0, 0, 3, 0] = float("nan")
    assert relative_error(attn_received(q, k)[1:], naive_attention(q, k)[1:]) < 1e-5


def test_misfits_are_named() -> None:
    with pytest.raises(InputError, match="attn_received: 3 query heads"):
        attn_received(torch.zeros(1, 3, 5, 8), torch.zeros(1, 2, 5, 8))
