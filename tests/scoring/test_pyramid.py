"""Pyramid sparse attention: the recorded blocks, and what must be dense attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vtprune.kernels.psa_attention import psa_attention
from vtprune.scoring.pyramid import coarsest, density, importance, levels_of


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def waves(length: int = 64, width: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    i, c = torch.meshgrid(torch.arange(length), torch.arange(width), indexing="ij")
    return torch.sin(0.11 * i * (c + 1))[None, None], torch.cos(0.07 * i * (c + 1))[None, None]


def test_importance_and_levels_by_hand():
    weights = importance(*waves(), 16, 4)[0, 0]
    wanted = [
        [4, 0, 0, 0],
        [2.5113, 1.4887, 0, 0],
        [1.2816, 1.5776, 1.1408, 0],
        [1.1552, 1.1462, 1.0503, 0.6483],
    ]
    assert torch.allclose(weights, torch.tensor(wanted), atol=1e-4)
    assert torch.allclose(weights.sum(1), torch.full((4,), 4.0))
    levels = levels_of(weights)
    assert levels.tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 4, 1]]
    assert density(levels).item() == pytest.approx(9.25 / 10)
    assert levels_of(weights, text_blocks=2).tolist()[3] == [1, 1, 1, 1]


@pytest.mark.parametrize("length", [1, 15, 16, 50, 64])
def test_all_whole_is_dense_attention(length):
    q, k, v = (draw(2, 3, length, 8, seed=seed) for seed in range(3))
    n = -(-length // 16)
    whole = torch.ones(2, 3, n, n, dtype=torch.int64).tril()
    found = psa_attention(q, k, v, whole, 16)
    dense = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert torch.allclose(found, dense, atol=1e-5)
    assert density(whole) == 1


@pytest.mark.parametrize("level", [2, 4, 8])
def test_equal_keys_may_be_one(level):
    q, v = draw(1, 2, 48, 8), draw(1, 2, 48, 8, seed=1)
    k = draw(1, 2, 48 // level, 8, seed=2).repeat_interleave(level, dim=2)
    levels = torch.ones(1, 2, 3, 3, dtype=torch.int64).tril()
    levels[..., 2, 0] = level
    found = psa_attention(q, k, v, levels, 16)
    dense = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert torch.allclose(found, dense, atol=1e-5)  # values of equal weights are averaged anyway
    assert (coarsest(k, 16) >= level).all()
    assert (coarsest(draw(1, 2, 48, 8, seed=3), 16) == 1).all()


def test_a_block_that_is_not_seen_does_not_matter():
    q, k, v = (draw(1, 1, 48, 8, seed=seed) for seed in range(3))
    levels = torch.ones(1, 1, 3, 3, dtype=torch.int64).tril()
    levels[..., 2, 1] = 0
    other = v.clone()
    other[:, :, 16:32] = 100.0
    found, changed = psa_attention(q, k, v, levels, 16), psa_attention(q, k, other, levels, 16)
    assert torch.equal(found[:, :, 32:], changed[:, :, 32:])
    assert not torch.equal(found[:, :, 16:32], changed[:, :, 16:32])
    assert density(levels).item() == pytest.approx(5 / 6)


def test_the_scale_is_that_of_the_caller():
    q, k, v = (draw(1, 1, 16, 8, seed=seed).bfloat16() for seed in range(3))
    one = torch.ones(1, 1, 1, 1, dtype=torch.int64)
    found = psa_attention(q, k, v, one, 16, scale=0.1)
    dense = F.scaled_dot_product_attention(
        q.float(), k.float(), v.float(), is_causal=True, scale=0.1
    )
    assert found.dtype == torch.bfloat16
    assert torch.allclose(found.float(), dense, atol=1e-2)
