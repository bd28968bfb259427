"""Density peaks with a strict order, and which dropped tokens are recycled into how many."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vtprune.scoring.clustering import density_peaks, n_kept, n_recycled, recycle


def plain(x: Tensor, n: int) -> tuple[list[int], list[int]]:
    """Centres and clusters of ``[M, D]`` by the definition, token by token."""
    m, width = x.shape
    apart = [[float((x[i] - x[j]).norm()) / width**0.5 for j in range(m)] for i in range(m)]
    density = [-sum(d * d for d in sorted(row)[:n]) / n for row in apart]
    density = [float(torch.tensor(d).exp()) for d in density]
    far, score = max(map(max, apart)), []
    for i in range(m):
        above = [j for j in range(m) if (density[j], -j) > (density[i], -i)]
        score.append(density[i] * min((apart[i][j] for j in above), default=far))
    centres = sorted(range(m), key=lambda i: (-score[i], i))[:n]
    cluster = [min(range(n), key=lambda c: (apart[i][centres[c]], c)) for i in range(m)]
    for place, centre in enumerate(centres):
        cluster[centre] = place
    return centres, cluster


@pytest.mark.parametrize("m", [1, 2, 3, 9, 30])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_the_definition(m: int, n: int) -> None:
    x = torch.randn(3, m, 5, generator=torch.Generator().manual_seed(m))
    centres, cluster = density_peaks(x, min(n, m))
    for row in range(3):
        wanted = plain(x[row], min(n, m))
        assert (centres[row].tolist(), cluster[row].tolist()) == wanted
        assert set(cluster[row].tolist()) == set(range(min(n, m)))


def test_of_two_mutual_neighbours_one_is_the_centre() -> None:
    """With two neighbours, itself among them, both are equally dense."""
    x = torch.tensor([[0.0, 0.1], [0.0, 0.0], [5.0, 0.0], [5.0, 0.3]])[None]
    centres, cluster = density_peaks(x, 2)
    assert centres.tolist() == [[0, 2]]
    assert cluster.tolist() == [[0, 0, 1, 1]]


def test_equal_tokens_and_broken_ones() -> None:
    centres, cluster = density_peaks(torch.ones(1, 6, 3), 2)
    assert centres.tolist() == [[0, 1]]
    assert cluster.tolist() == [[0, 1, 0, 0, 0, 0]]  # no cluster is empty
    x = torch.randn(1, 8, 3, generator=torch.Generator().manual_seed(0))
    x[0, 2] = float("nan")
    centres, _ = density_peaks(x, 3)
    assert 2 not in centres[0].tolist()


@pytest.mark.parametrize(
    ("n", "kept", "left"),  # the table of the authors for 192, and two others
    [(576, 300, 309), (309, 200, 204), (204, 110, 113), (312, 110, 117), (82, 30, 32)],
)
def test_the_counts_of_the_authors(n: int, kept: int, left: int) -> None:
    assert kept + n_recycled(n - kept)[1] == left
    assert n_kept(n, left) == kept


@pytest.mark.parametrize("n", [2, 3, 11, 40, 200])
def test_every_count_can_be_reached(n: int) -> None:
    score = torch.rand(2, n, generator=torch.Generator().manual_seed(n))
    tokens = torch.randn(2, n, 4, generator=torch.Generator().manual_seed(1))
    for k in range(1, n):
        selection = recycle(score, tokens, k)
        assert selection.rows.shape == (2, k)
        assert all(len(set(row)) == k for row in selection.rows.tolist())
        first = n_kept(n, k)
        assert 1 <= first <= k
        assert (selection.rows[:, :first].diff() > 0).all()


def test_what_is_recycled_is_the_mean_of_the_best_of_the_rest() -> None:
    score = torch.arange(30.0).flip(0)[None]
    tokens = torch.randn(1, 30, 4, generator=torch.Generator().manual_seed(0))
    selection = recycle(score, tokens, 11)
    assert selection.mix is not None
    assert n_kept(30, 11) == 10
    pool, _ = n_recycled(20)
    assert selection.mix.source.tolist() == [list(range(10 + pool))]
    made = selection.apply(tokens)
    assert torch.equal(made[:, :10], tokens[:, :10])
    torch.testing.assert_close(made[0, 10], tokens[0, 10 : 10 + pool].mean(0))
