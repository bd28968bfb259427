from __future__ import annotations

import pytest
import torch

from tests.kernels.kernel_inputs import DTYPES, SIZES, naive_attention, normal, relative_error
from vtprune.errors import ConfigError, InputError
from vtprune.kernels.attn_rows import attn_rows


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize(("batch", "heads", "shared"), [(1, 1, 1), (3, 4, 2), (3, 7, 1)])
@pytest.mark.parametrize("m", [1, 5])
def test_matches_the_definition(n: int, batch: int, heads: int, shared: int, m: int) -> None:
    q, k = normal(batch, heads, m, 16), normal(batch, shared, n, 16, seed=1)
    got = attn_rows(q, k)
    assert got.shape == (batch, n)
    assert got.dtype == torch.float32
    assert relative_error(got, naive_attention(q, k)) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
def test_narrow_inputs_are_computed_in_float32(dtype: torch.dtype) -> None:
    q, k = normal(3, 4, 1, 72, dtype=dtype), normal(3, 4, 123, 72, seed=1, dtype=dtype)
    got = attn_rows(q, k)
    assert got.dtype == torch.float32
    assert relative_error(got, naive_attention(q, k)) < 1e-5


def test_scale_is_applied_and_large_logits_do_not_overflow() -> None:
    q, k = normal(2, 2, 3, 16), normal(2, 2, 9, 16, seed=1)
    assert relative_error(attn_rows(q, k, scale=0.5), naive_attention(q, k, 0.5)) < 1e-5
    assert relative_error(attn_rows(q, k, scale=50.0), naive_attention(q, k, 50.0)) < 1e-5


def test_layout_does_not_matter() -> None:
    qkv = normal(2, 9, 3, 4, 16)  # [B, N, 3, H, d], a fused projection
    q, k = qkv[:, :, 0].transpose(1, 2)[:, :, :1], qkv[:, :, 1].transpose(1, 2)
    assert torch.equal(attn_rows(q, k), attn_rows(q.contiguous(), k.contiguous()))


def test_autocast_does_not_lower_the_precision() -> None:
    q, k = normal(1, 2, 1, 16), normal(1, 2, 33, 16, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(attn_rows(q, k), attn_rows(q.clone(), k))
        assert relative_error(attn_rows(q, k), naive_attention(q, k)) < 1e-5


@pytest.mark.parametrize("chunk_bytes", [1, 500])
def test_the_memory_limit_changes_nothing(chunk_bytes: int) -> None:
    q, k = normal(3, 4, 5, 16), normal(3, 2, 9, 16, seed=1)
    limited = attn_rows(q, k, chunk_bytes=chunk_bytes)
    assert relative_error(limited, naive_attention(q, k)) < 1e-5


@pytest.mark.parametrize(
    ("q", "k", "message"),
    [
        ((1, 2, 1, 8), (1, 2, 5, 4), "batch and head width"),
        ((2, 2, 1, 8), (1, 2, 5, 8), "batch and head width"),
        ((1, 3, 1, 8), (1, 2, 5, 8), "multiple"),
        ((1, 2, 0, 8), (1, 2, 5, 8), "0 queries"),
        ((1, 2, 1, 8), (1, 2, 0, 8), "0 keys"),
        ((1, 2, 8), (1, 2, 5, 8), "B, H, M, d"),
    ],
)
def test_misfits_are_named(q: tuple[int, ...], k: tuple[int, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        attn_rows(torch.zeros(q), torch.zeros(k))


def test_integers_and_a_limit_of_nothing_are_refused() -> None:
    x = torch.zeros(1, 1, 1, 4)
    with pytest.raises(InputError, match="float"):
        attn_rows(x.long(), x)
    with pytest.raises(ConfigError, match="chunk_bytes=0"):
        attn_rows(x, x, chunk_bytes=0)


@pytest.mark.parametrize("chunk_bytes", [1, 500, 1 << 20])
def test_a_query_sees_what_it_may(chunk_bytes: int) -> None:
    q, k = normal(2, 4, 5, 16), normal(2, 2, 9, 16, seed=1)
    seen = torch.ones(5, 9, dtype=torch.bool).tril(4)
    got = attn_rows(q, k, seen=seen, chunk_bytes=chunk_bytes)
    rows = [attn_rows(q[:, :, i : i + 1], k[:, :, : i + 5]) for i in range(5)]
    want = torch.stack([torch.nn.functional.pad(row, (0, 9 - row.shape[1])) for row in rows])
    assert relative_error(got, want.mean(0)) < 1e-5
    assert torch.equal(attn_rows(q, k, seen=torch.ones_like(seen)), attn_rows(q, k))
    with pytest.raises(InputError, match="seen is"):
        attn_rows(q, k, seen=seen[:, 1:])
