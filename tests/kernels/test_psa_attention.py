from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.kernels.kernel_inputs import (
    DTYPES,
    drawn_levels,
    naive_pyramid,
    normal,
    relative_error,
)
from vtprune.errors import ConfigError, InputError
from vtprune.kernels.psa_attention import psa_attention


def inputs(batch: int, heads: tuple[int, int], n: int, d: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of so many heads."""
    q, k, v = (normal(batch, heads[at > 0], n, d, seed=at) for at in range(3))
    return q, k, v


@pytest.mark.parametrize("n", [1, 7, 8, 9, 50])
@pytest.mark.parametrize(("heads", "whole"), [((3, 1), False), ((4, 2), True)])
def test_matches_the_definition(n: int, heads: tuple[int, int], whole: bool) -> None:
    q, k, v = inputs(2, heads, n)
    blocks = -(-n // 8)
    levels = drawn_levels(2, heads[0], blocks, blocks, seed=n, whole=whole or n == 1)
    got = psa_attention(q, k, v, levels, 8)
    assert got.shape == q.shape and got.dtype == torch.float32
    assert relative_error(got, naive_pyramid(q, k, v, levels, 8)) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
def test_narrow_inputs_are_computed_in_float32(dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in inputs(1, (2, 1), 40, 12))
    levels = drawn_levels(1, 2, 3, 3, seed=1)
    got = psa_attention(q, k, v, levels, 16, scale=0.4)
    want = naive_pyramid(q, k, v, levels, 16, scale=0.4)
    assert got.dtype == dtype
    assert relative_error(got, want) < max(1e-5, torch.finfo(dtype).eps)


@pytest.mark.parametrize("n", [1, 31, 32, 33])
def test_all_seen_whole_is_causal_attention(n: int) -> None:
    q, k, v = inputs(2, (4, 2), n)
    blocks = -(-n // 16)
    want = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    ones = torch.ones(2, 4, blocks, blocks)
    for levels in (ones.long(), ones.bool(), ones.bool().tril()):
        assert relative_error(psa_attention(q, k, v, levels, 16), want) < 1e-5


def test_what_comes_after_a_token_does_not_touch_it() -> None:
    q, k, v = inputs(1, (2, 2), 61)
    levels = drawn_levels(1, 2, 4, 4, seed=2, whole=False)
    want = psa_attention(q, k, v, levels, 16)
    for x in (q, k, v):
        x[:, :, 45:] = 7.0
    assert torch.equal(psa_attention(q, k, v, levels, 16)[:, :, :45], want[:, :, :45])
    fewer = psa_attention(q[:, :, :45], k[:, :, :45], v[:, :, :45], levels[..., :3, :3], 16)
    assert relative_error(fewer, want[:, :, :45]) < 1e-5


def test_a_query_that_sees_nothing_gets_nothing() -> None:
    q, k, v = inputs(1, (1, 1), 16)
    levels = torch.tensor([[[[8, 1], [0, 0]]]])
    got = psa_attention(q, k, v, levels, 8)
    assert bool((got[:, :, :7] == 0).all() and (got[:, :, 8:] == 0).all())
    assert torch.allclose(got[0, 0, 7], v[0, 0, :8].mean(0), atol=1e-6)


def test_gradients_are_those_of_attention() -> None:
    q, k, v = (x.requires_grad_() for x in inputs(1, (2, 1), 20))
    ones = torch.ones(1, 2, 3, 3, dtype=torch.bool)
    want = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    ours = torch.autograd.grad(psa_attention(q, k, v, ones, 8).square().sum(), (q, k, v))
    theirs = torch.autograd.grad(want.square().sum(), (q, k, v))
    for got, right in zip(ours, theirs, strict=True):
        assert relative_error(got, right) < 1e-5


def test_misfits_are_named() -> None:
    q, k, v = inputs(1, (4, 2), 20)
    levels = torch.ones(1, 4, 3, 3, dtype=torch.int64)
    for block in (0, 12, -8, True, 8.0):
        with pytest.raises(ConfigError, match=r"block=.*; give a positive multiple of 8\."):
            psa_attention(q, k, v, levels, block)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match=r"levels are \[1, 4, 3, 3\] .* give integers \[1, 4, 2"):
        psa_attention(q, k, v, levels, 16)
    with pytest.raises(InputError, match=r"levels are .* torch.float32; for 20 tokens"):
        psa_attention(q, k, v, levels.float(), 8)
    with pytest.raises(InputError, match="give as many queries as keys, and values"):
        psa_attention(q[:, :, :8], k, v, levels, 8)
    with pytest.raises(InputError, match="give as many queries as keys, and values"):
        psa_attention(q, k, v[..., :4], levels, 8)
    with pytest.raises(InputError, match="3 query heads cannot share 2 key heads"):
        psa_attention(q[:, :3], k, v, levels[:, :3], 8)
