"""Energies and the pairs that they make, held against loops in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vtprune.scoring.energy import energies, match_by_energy


def cosines(metric: Tensor) -> list[list[float]]:
    x = metric.double()
    unit = [[v / math.sqrt(sum(c * c for c in row)) for v in row] for row in x.tolist()]
    return [[sum(a * b for a, b in zip(p, q, strict=True)) for q in unit] for p in unit]


def energy_of(row: list[float], margin: float, alpha: float) -> float:
    above = [c - margin for c in row]
    return sum(c if c > 0 else alpha * (math.exp(c) - 1) for c in above) / len(above)


def paired(metric: Tensor, r: int, margin: float, alpha: float, protect: bool) -> dict[int, int]:
    """Which token each of those that leave goes into."""
    similar = cosines(metric)
    energy = [round(energy_of(row, margin, alpha), 9) for row in similar]
    order = sorted(range(len(energy)), key=lambda i: (-energy[i], i))
    order = order[: 2 * r] if protect else order
    even, odd = order[::2], order[1::2]
    goal = {i: max(odd, key=lambda j: (similar[i][j], -odd.index(j))) for i in even}
    best = sorted(even, key=lambda i: (-similar[i][goal[i]], even.index(i)))
    return {i: goal[i] for i in best[:r]}


def test_energies_by_hand() -> None:
    similarity = torch.tensor([[[1.0, 0.5], [0.5, 1.0]], [[1.0, -1.0], [-1.0, 1.0]]])
    low = 2 * (math.exp(-1.5) - 1)
    found = energies(similarity, 0.5, 2.0)
    torch.testing.assert_close(found, torch.tensor([[0.25] * 2, [(0.5 + low) / 2] * 2]))


@given(st.data())
def test_pairs_are_those_of_the_loops(data: st.DataObject) -> None:
    n = data.draw(st.integers(2, 30))
    r, protect = data.draw(st.integers(1, n // 2)), data.draw(st.booleans())
    margin = data.draw(st.sampled_from([-0.2, 0.3, 0.75]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    metric = torch.randn(2, n, 5, generator=generator)
    rows, into = match_by_energy(metric, r, margin, 1.5, protect)
    assert rows.shape == (2, n - r)
    assert (rows.diff() > 0).all()
    for b in range(2):
        wanted = paired(metric[b], r, margin, 1.5, protect)
        found = {i: int(rows[b, into[b, i]]) for i in range(n)}
        assert found == {i: wanted.get(i, i) for i in range(n)}


@pytest.mark.parametrize("protect", [True, False])
def test_broken_tokens_have_no_energy_and_resemble_none(protect: bool) -> None:
    metric = torch.ones(1, 8, 3)
    metric[0, 2] = float("nan")
    metric[0, 5] = float("inf")
    rows, into = match_by_energy(metric, 3, 0.5, 1.0, protect)
    assert {2, 5} <= set(rows[0].tolist())
    assert into[0].bincount(minlength=5)[[rows[0].tolist().index(i) for i in (2, 5)]].tolist() == [
        1,
        1,
    ]
