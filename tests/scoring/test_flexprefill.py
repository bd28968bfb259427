"""FlexPrefill's blocks, against the definition head by head, number by number."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vtprune.kernels.psa_attention import psa_attention
from vtprune.scoring.flexprefill import blocks_seen, by_distance, last_attention
from vtprune.scoring.pyramid import density


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def defined(q: Tensor, k: Tensor, block: int, gamma: float, tau: float, least: int) -> Tensor:
    """One head ``[L, d]`` in plain loops; returns ``[n, n]``."""
    length, width = q.shape
    n = math.ceil(length / block)
    scale = width**-0.5
    columns, distances = [0.0] * length, [0.0] * length
    for at in range(length - block, length):
        row = (q[at] @ k[: at + 1].T * scale).softmax(0).tolist()
        for key, weight in enumerate(row):
            columns[key] += weight / block
            distances[at - key] += weight / block

    def needed(values: list[float]) -> int:
        total = count = 0
        for value in sorted(values, reverse=True):
            total += value
            count += total <= gamma
        return min(n, max(least, (count + 1) // block + 1))

    def picked(sums: list[float], count: int) -> set[int]:
        order = sorted(range(1, n), key=lambda at: (-sums[at], at))
        return {0, *order[: count - 1]}

    per_column = [sum(columns[j * block : (j + 1) * block]) for j in range(n)]
    per_distance = [0.0] * n
    for distance, weight in enumerate(distances):
        per_distance[n - 1 - (length - 1 - distance) // block] += weight
    means = torch.stack([part.mean(0) for part in k.split(block)])
    guess = (q[-block:].mean(0) @ means.T * scale).softmax(0).tolist()
    divergence = 0.0
    for one, other in zip(guess, per_column, strict=True):
        middle = (one + other) / 2
        divergence += one / 2 * math.log(one / middle) + other / 2 * math.log(other / middle)
    asks = math.sqrt(divergence) < tau
    kept_columns = picked(per_column, least if asks else needed(columns))
    kept_distances = picked(per_distance, least if asks else needed(distances))
    seen = torch.zeros(n, n, dtype=torch.bool)
    for i in range(n):
        for j in range(i + 1):
            seen[i, j] = j in kept_columns or i - j in kept_distances
    if asks:
        pairs = []
        for i, part in enumerate(q.split(block)):
            weights = (part.mean(0) @ means[: i + 1].T * scale).softmax(0).tolist()
            pairs += [(-weight, i, j) for j, weight in enumerate(weights)]
        total = 0.0
        for weight, i, j in sorted(pairs):
            total -= weight
            if total <= gamma * n:
                seen[i, j] = True
    return seen


@pytest.mark.parametrize("length", [64, 70, 79])
@pytest.mark.parametrize("tau", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("gamma", [0.3, 0.6, 0.9])
def test_matches_the_definition(length: int, tau: float, gamma: float) -> None:
    q, k = 2 * draw(2, 4, length, 8), draw(2, 2, length, 8, seed=1)
    k[:, 0, 19] += 3 * q[:, 0, -1]
    got = blocks_seen(q, k, 8, gamma, tau, 2)
    assert got.shape == (2, 4, -(-length // 8), -(-length // 8)) and got.dtype == torch.bool
    for row in range(2):
        for head in range(4):
            want = defined(q[row, head], k[row, head // 2], 8, gamma, tau, 2)
            assert torch.equal(got[row, head], want), (row, head)


def test_both_kinds_of_heads_occur() -> None:
    """Heads of one call differ: what keys' means explain, and what they do not."""
    q, k = 0.05 * draw(1, 2, 64, 8), draw(1, 2, 64, 8, seed=1)
    k[:, 1, 36], k[:, 1, 37] = -20.0, 20.0  # their mean says nothing of them
    q[:, 1] += 1.0
    got = blocks_seen(q, k, 8, 0.9, 0.1, 2)[0]
    only_lines = blocks_seen(q, k, 8, 0.9, 0.0, 2)[0]
    assert not torch.equal(got[0], only_lines[0]) and torch.equal(got[1], only_lines[1])
    assert bool(got[1, 4:, 4].all())  # the column of the key that all attend to


def test_distances_are_counted_from_each_query() -> None:
    q, k = draw(1, 1, 20, 4), draw(1, 1, 20, 4, seed=1)
    weights = last_attention(q, k, 6)
    assert torch.allclose(weights.sum(-1), torch.ones(1, 1, 6))
    want = torch.zeros(20)
    for row, at in enumerate(range(14, 20)):
        for key in range(at + 1):
            want[at - key] += weights[0, 0, row, key] / 6
    assert torch.allclose(by_distance(weights)[0, 0], want, atol=1e-6)


@pytest.mark.parametrize(("length", "least"), [(1, 4), (16, 1), (32, 4), (30, 3)])
def test_short_prompts_are_seen_whole(length: int, least: int) -> None:
    q = draw(2, 2, length, 8)
    n = -(-length // 8)
    seen = blocks_seen(q, q, 8, least=least)
    if length <= 8 * max(2, least):
        assert torch.equal(seen, torch.ones(n, n).tril().bool().expand(2, 2, n, n))
    else:
        assert not bool(seen.all())


def test_what_is_seen_covers_the_attention_that_is_asked_for() -> None:
    q, k, v = (draw(1, 3, 256, 16, seed=seed) for seed in range(3))
    k[:, :, :4] += 4 * q.mean(2, keepdim=True)
    errors, shares = [], []
    whole = torch.ones(1, 3, 16, 16, dtype=torch.bool)
    want = psa_attention(q, k, v, whole, 16)
    for gamma in (0.2, 0.6, 0.95, 0.999):
        seen = blocks_seen(q, k, 16, gamma, 0.0, 1)
        assert bool(seen.diagonal(dim1=-2, dim2=-1).all() and seen[..., 0].all())
        assert not bool(seen.triu(1).any())
        errors.append(float((psa_attention(q, k, v, seen, 16) - want).norm() / want.norm()))
        shares.append(float(density(seen)))
    assert shares == sorted(shares) and errors == sorted(errors, reverse=True)
    assert errors[0] > 0.1 and shares[0] < 0.5


def test_prompts_of_a_batch_are_as_each_alone() -> None:
    q, k = draw(3, 4, 90, 8).bfloat16(), draw(3, 2, 90, 8, seed=1).bfloat16()
    together = blocks_seen(q, k, 8, 0.6, 0.3, 2)
    assert torch.equal(together[1:2], blocks_seen(q[1:2], k[1:2], 8, 0.6, 0.3, 2))
