"""PyramidDrop: one share per stage from the mean over layers, and the counts that follow."""

from __future__ import annotations

import pytest
import torch

from vtprune.errors import InputError
from vtprune.registry import build
from vtprune.scoring.schedule import scaled
from vtprune.types import Budget, Inside, LastRow, Signals

AUTHORS = (8, 16, 24)


def inside(stage: int, layers: tuple[int, ...] = AUTHORS, n: int = 576) -> Inside:
    return Inside(stage, layers, 32, (n,))


@pytest.mark.parametrize(
    ("layers", "keep", "wanted"),
    [
        (AUTHORS, 0.46875, 0.5),  # (1 + 1/2 + 1/4 + 1/8) / 4
        (AUTHORS, 1.0, 1.0),
        ((16,), 0.75, 0.5),
        ((16,), 0.625, 0.25),
        ((4, 24), 0.296875, 0.25),  # (4 + 20 / 4 + 8 / 16) / 32
    ],
)
def test_the_share_of_a_stage(layers, keep, wanted):
    halves = [0.5 ** (stage + 1) for stage in range(len(layers))]
    each = [wanted ** (stage + 1) for stage in range(len(layers))]
    assert scaled(halves, layers, 32, keep) == pytest.approx(each)


def test_the_authors_counts():
    strategy, budget = build("pyramiddrop"), Budget(fraction=0.46875)
    found = []
    for stage in range(3):
        signals = Signals(torch.zeros(1, 576, 2), inside=inside(stage))
        found += strategy.counts(signals, budget)
    assert found == [288, 144, 72]


def test_tokens_are_a_mean_too():
    strategy = build("pyramiddrop")
    signals = Signals(torch.zeros(1, 576, 2), inside=inside(0))
    assert strategy.counts(signals, Budget(tokens=270)) == [288]


def test_the_rank_is_that_of_the_last_row():
    row = torch.tensor([[0.1, 0.4, 0.2, 0.3]])
    signals = Signals(torch.zeros(1, 4, 2), values={LastRow(8): row}, inside=inside(0))
    assert build("pyramiddrop").select(signals, 2).rows.tolist() == [[1, 3]]


def test_it_must_know_where_it_is():
    with pytest.raises(InputError, match=r"signals\.inside says where"):
        build("pyramiddrop").counts(Signals(torch.zeros(1, 4, 2)), Budget(tokens=2))
