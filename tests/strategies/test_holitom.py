"""HoliTom: segments by what stands still, and what its tokens are made of."""

from __future__ import annotations

import itertools

import pytest
import torch

import vtprune
from tests.strategies.test_video import moving
from vtprune.errors import ConfigError
from vtprune.scoring.still import (
    Pool,
    around_centres,
    loosened,
    pools_of,
    segments,
    still_places,
    still_runs,
)
from vtprune.scoring.temporal import changes
from vtprune.strategies.holitom import HoliTom
from vtprune.types import Received, Signals


def draw(t: int, n: int, seed: int) -> torch.Tensor:
    return torch.rand(t - 1, n, generator=torch.Generator().manual_seed(seed)) < 0.6


def test_the_moving_clip_is_one_segment():
    x = moving()
    spans, redundant = segments(still_runs(changes(x[1:], x[:-1]) < 0.2), 1024)
    assert (spans, redundant) == ([(0, 6)], 15)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("window", [3, 99])
def test_segments_are_the_best_of_all_ways_to_cut(seed, window):
    still = draw(7, 4, seed)

    def redundant(cut: tuple[int, ...]) -> int:
        ends = [0, *cut, 7]
        return sum(
            (end - first - 1) * int(still[first : end - 1].all(0).sum())
            for first, end in itertools.pairwise(ends)
            if end - first > 1
        )

    cuts = [c for r in range(7) for c in itertools.combinations(range(1, 7), r)]
    fitting = [c for c in cuts if all(b - a <= window for a, b in itertools.pairwise([0, *c, 7]))]
    spans, found = segments(still_runs(still), window)
    assert found == max(map(redundant, fitting)) == redundant(tuple(e for _, e in spans[:-1]))
    assert all(end - first <= window for first, end in spans)


@pytest.mark.parametrize("seed", range(4))
def test_pools_hold_every_token_once(seed):
    runs = still_runs(draw(9, 5, seed))
    spans, redundant = segments(runs, 99)
    pools = pools_of(spans, still_places(spans, runs), torch.device("cpu"))
    seen = torch.zeros(9, 5)
    for pool in pools:
        seen[pool.span[0] : pool.span[1], pool.places] += 1
    assert (seen == 1).all()
    assert sum(len(pool.places) for pool in pools) == 45 - redundant


def test_loosened_frees_what_moves_most_and_no_more_than_it_must():
    changed = torch.tensor([[0.0, 0.15, 0.2, 0.9], [0.1, 0.0, 0.3, 0.9]])
    runs = still_runs(changed < 0.5)
    spans, redundant = segments(runs, 99)
    still = still_places(spans, runs)
    assert (spans, redundant, still.tolist()) == ([(0, 3)], 6, [[True, True, True, False]])
    for k, wanted in [(6, [1, 1, 1, 0]), (7, [1, 1, 0, 0]), (8, [1, 1, 0, 0]), (9, [1, 0, 0, 0])]:
        found = loosened(spans, still, changed, k)
        assert found.int().tolist() == [wanted], k
    assert not loosened(spans, still, changed, 12).any()


def test_a_centre_counts_beta_and_the_others_share_the_rest():
    x = torch.tensor([[[0.0], [1.0], [10.0], [11.0]], [[0.0], [3.0], [12.0], [12.0]]])
    made = around_centres(Pool((0, 2), torch.tensor([0, 1, 2, 3])), x, 2, 7, 0.6)
    assert made.rows.tolist() == [0, 2]  # with means of 0, 2 and 11, 11.5
    parts = made.weight[:, None] * x.flatten(0, 1)[made.source]
    out = torch.zeros(2, 1).index_add_(0, made.target, parts)
    assert out.flatten().tolist() == pytest.approx([0.4 * 2, 0.6 * 11 + 0.4 * 11.5])
    alone = around_centres(Pool((0, 2), torch.tensor([1])), x, 1, 7, 0.6)
    assert alone.rows.tolist() == [1]
    assert alone.weight.tolist() == [0.5, 0.5]


@pytest.mark.parametrize("contextual", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("tau", [0.0, 0.8, 1.0])
def test_any_count_is_met_and_weights_sum_to_one(tau, contextual):
    clip = Signals(moving().flatten(0, 1)[None], (6, 2, 3))
    clip.values = {Received(0): torch.rand(1, 36, generator=torch.Generator().manual_seed(0))}
    for k in range(1, 36):
        made = vtprune.select(HoliTom(tau=tau, contextual=contextual), keep=k, signals=clip)
        assert made.rows.shape == (1, k)
        assert (made.rows.diff() > 0).all()
        assert torch.allclose(made.apply(torch.ones(1, 36, 1)), torch.ones(1, k, 1))


@pytest.mark.parametrize("options", [{"tau": 1.1}, {"beta": -0.1}, {"contextual": 2}, {"near": 0}])
def test_refuses(options):
    with pytest.raises(ConfigError, match=f"{next(iter(options))}="):
        HoliTom(**options)
