from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
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


@pytest.mark.slow
def test_memory_stays_within_the_limit_for_many_tokens() -> None:
    q, k = normal(1, 1, 16384, 8), normal(1, 1, 16384, 8, seed=1)
    with _Largest() as largest:
        got = attn_received(q, k, chunk_bytes=1 << 24)  # the matrix takes 2 ** 30
    assert largest.bytes <= 1 << 24
    assert abs(float(got.double().sum()) - 1) < 1e-5


@pytest.mark.parametrize("chunk_bytes", [1, 500, 1 << 20])
@pytest.mark.parametrize(("m", "n"), [(1, 1), (1, 9), (9, 9), (5, 33)])
def test_queries_see_earlier_keys(m: int, n: int, chunk_bytes: int) -> None:
    q, k = normal(2, 4, m, 16), normal(2, 2, n, 16, seed=1)
    got = attn_received(q, k, causal=True, chunk_bytes=chunk_bytes)
    assert relative_error(got, naive_attention(q, k, seen=earlier(m, n))) < 1e-5


@pytest.mark.parametrize("chunk_bytes", [1, 500, 1 << 20])
def test_known_sums_are_used(chunk_bytes: int) -> None:
    q, k = normal(3, 4, 9, 16), normal(3, 2, 11, 16, seed=1)
    lse = log_sums(q, k)
    got = attn_received(q, k, lse=lse.float(), chunk_bytes=chunk_bytes)
    assert relative_error(got, naive_attention(q, k)) < 1e-5
    exact = attn_received(q.double(), k.double(), lse=lse + 1.0, chunk_bytes=chunk_bytes)
    assert relative_error(exact, naive_attention(q, k) / torch.e) < 1e-7


@pytest.mark.parametrize("causal", [False, True])
def test_packed_sequences_are_as_each_alone(causal: bool) -> None:
    lengths = [1, 9, 4]
    q, k = normal(1, 4, 14, 16), normal(1, 2, 14, 16, seed=1)
    parts = list(zip(q.split(lengths, 2), k.split(lengths, 2), strict=True))
    want = torch.cat([attn_received(x, y, causal=causal) for x, y in parts], 1)
    assert torch.equal(attn_received(q, k, causal=causal, lengths=lengths), want)
    if not causal:
        lse = torch.cat([log_sums(x, y) for x, y in parts], 2).float()
        assert relative_error(attn_received(q, k, lse=lse, lengths=lengths), want) < 1e-5


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
    q = torch.zeros(1, 2, 5, 8)
    with pytest.raises(InputError, match="causal, but of 5 queries only the last 3"):
        attn_received(q, q[:, :, :3], causal=True)
    with pytest.raises(InputError, match=r"lse is \[1, 2, 4\]; give \[1, 2, 5\]"):
        attn_received(q, q, lse=torch.zeros(1, 2, 4))
    for lengths in ([], [5, 1], [6, -1], [0, 5]):
        with pytest.raises(InputError, match="positive lengths that sum to them"):
            attn_received(q, q, lengths=lengths)
    with pytest.raises(InputError, match="give one row"):
        attn_received(q.repeat(2, 1, 1, 1), q.repeat(2, 1, 1, 1), lengths=[5])
