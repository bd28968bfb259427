"""What looks at nothing: even distances, and a draw by the seed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vtprune
from vtprune.types import Signals


def rows(name: str, n: int, k: int, **options: Any) -> list[list[int]]:
    return vtprune.select(
        name, keep=k, signals=Signals(torch.zeros(2, n, 4)), **options
    ).rows.tolist()


@pytest.mark.parametrize(
    ("n", "k", "wanted"),
    [(10, 1, [5]), (10, 2, [2, 7]), (9, 3, [1, 4, 7]), (7, 3, [1, 3, 5]), (4, 3, [0, 2, 3])],
)
def test_strided_takes_the_middles_of_equal_stretches(n: int, k: int, wanted: list[int]) -> None:
    assert rows("strided", n, k) == [wanted, wanted]


def test_random_depends_on_the_seed_and_the_number_of_tokens_alone() -> None:
    state = torch.get_rng_state()
    draw = torch.rand(30, generator=torch.Generator().manual_seed(5))
    best = sorted(draw.argsort(descending=True)[:8].tolist())
    assert rows("random", 30, 8, seed=5) == [best, best]
    assert rows("random", 30, 8, seed=6)[0] != best
    assert torch.equal(torch.get_rng_state(), state)


def test_random_is_even_handed() -> None:
    counts = torch.zeros(20)
    for seed in range(500):
        counts[rows("random", 20, 5, seed=seed)[0]] += 1
    assert 90 < float(counts.min()) <= float(counts.max()) < 165  # 125 expected, sigma below 10
