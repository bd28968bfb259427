"""LLaVA-Scissor: components by hand and by scipy, and what a representative is made of."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.sparse.csgraph import connected_components
from scipy.spatial.distance import squareform

import vtprune
from vtprune.errors import ConfigError
from vtprune.scoring.components import components, fitting, labels_of, linked_to
from vtprune.strategies.llava_scissor import LLaVAScissor
from vtprune.types import Budget, Signals

T, N, D = 4, 10, 3


def video(seed: int = 0) -> torch.Tensor:
    return torch.randn(T, N, D, generator=torch.Generator().manual_seed(seed))


def partition(labels) -> set[frozenset[int]]:
    groups: dict[int, set[int]] = {}
    for i, label in enumerate(list(labels)):
        groups.setdefault(int(label), set()).add(i)
    return {frozenset(group) for group in groups.values()}


def cosines(x: torch.Tensor) -> torch.Tensor:
    units = F.normalize(x, dim=-1)
    return units @ units.mT


@pytest.mark.parametrize("tau", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("seed", range(4))
def test_labels_are_connected_components(seed, tau):
    linked = cosines(video(seed)) > tau
    found = labels_of(linked)
    for one, labels in zip(linked, found, strict=True):
        assert partition(labels) == partition(connected_components(one.numpy())[1])
        assert all(min(group) == labels[min(group)] for group in partition(labels))


@pytest.mark.parametrize("k", [1, 2, 7, 39, 40])
@pytest.mark.parametrize("seed", range(3))
def test_links_are_single_linkage(seed, k):
    alike = cosines(video(seed).flatten(0, 1))
    apart = (1 - alike).double().clamp(min=0).numpy()
    apart[range(40), range(40)] = 0
    tree = linkage(squareform(apart, checks=False), "single")
    assert partition(linked_to(alike, k)) == partition(fcluster(tree, k, "maxclust"))


@pytest.mark.parametrize("seed", range(3))
def test_a_component_is_a_mean_of_means(seed):
    x = video(seed)
    found = components(x, 0.9)
    flat = x.flatten(0, 1)
    inner = [
        frame * N + torch.tensor(sorted(group))
        for frame in range(T)
        for group in partition(labels_of(cosines(x[frame]) > 0.9))
    ]
    means = torch.stack([flat[group].mean(0) for group in inner])
    outer = partition(labels_of(cosines(means) > 0.9))
    wanted = {
        frozenset(int(i) for part in group for i in inner[part]): means[sorted(group)].mean(0)
        for group in outer
    }
    assert partition(found.of) == set(wanted)
    for number, row in enumerate(found.rows.tolist()):
        members = (found.of == number).nonzero()[:, 0]
        assert row in members
        made = (flat[members] * found.weight[members, None]).sum(0)
        assert torch.allclose(made, wanted[frozenset(members.tolist())], atol=1e-6)
    assert (found.rows.diff() > 0).all()


@pytest.mark.parametrize("seed", range(2))
def test_any_number_can_be_asked_for(seed):
    for k in range(1, T * N):
        found = fitting(video(seed), k)
        assert len(found.rows) == len(found.of.unique()) == k


def test_still_frames_become_one():
    x = video()[:1].expand(T, N, D).contiguous()
    found = fitting(x, N)
    assert partition(found.of) == {frozenset(t * N + n for t in range(T)) for n in range(N)}


def test_every_token_is_added_to_the_one_it_is_most_like():
    x = video(3)
    signals = Signals(x.flatten(0, 1)[None], (T, 2, 5))
    made = vtprune.select("llava_scissor", keep=6, signals=signals)
    found = fitting(x, 6)
    flat = x.flatten(0, 1)
    means = torch.zeros(6, D).index_add_(0, found.of, flat * found.weight[:, None])
    to = (F.normalize(flat, dim=-1) @ F.normalize(means, dim=-1).mT).argmax(1)
    wanted = [(means[j] + flat[to == j].sum(0)) / (1 + int((to == j).sum())) for j in range(6)]
    assert torch.allclose(made.apply(signals.tokens)[0], torch.stack(wanted), atol=1e-5)
    assert torch.equal(made.rows[0], found.rows)


def test_a_threshold_in_place_of_a_budget():
    signals = Signals(torch.stack([video(1), video(2)]).flatten(1, 2), (T, 2, 5))
    found = [len(components(video(seed), 0.9).rows) for seed in (1, 2)]
    strategy = LLaVAScissor(tau=0.9)
    assert strategy.counts(signals, Budget(tokens=39)) == found
    assert strategy.counts(signals, Budget(tokens=3)) == [3, 3]
    assert strategy.counts(signals, Budget(fraction=1.0)) == [40, 40]
    one = signals.rows(torch.tensor([0]))
    assert torch.equal(strategy.select(one, found[0]).rows[0], components(video(1), 0.9).rows)
    with pytest.raises(ConfigError, match=r"tau=1\.5 must be a cosine"):
        LLaVAScissor(tau=1.5)
