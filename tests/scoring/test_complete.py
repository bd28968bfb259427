"""Merging into any other token against a loop in double precision, and its laws."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from vtprune.scoring import complete
from vtprune.scoring.complete import guided, merge_guided, pairs, redundancy_rank


def drawn(n: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    size = torch.randint(1, 6, (2, n), generator=generator).float()
    return torch.randn(2, n, 5, generator=generator), torch.rand(2, n, generator=generator), size


def by_loops(metric: Tensor, importance: Tensor, rank: list[int], r: int) -> dict[int, int]:
    """The partner of each token of one image that leaves; the rank decides who may make up."""
    n, x = len(metric), metric.double()
    like = [[float(torch.cosine_similarity(x[i], x[j], dim=0)) for j in range(n)] for i in range(n)]
    worth: list[float] = []
    for i in range(n):
        later = [like[i][j] for j in range(n) if rank[j] > rank[i]]
        worth.append(float(importance[i]) - max(later) if later else float("inf"))
    leaves = sorted(range(n), key=lambda i: worth[i])[:r]
    stays = [i for i in range(n) if i not in leaves]
    return {i: max(stays, key=lambda j: like[i][j]) for i in leaves}


def same_as_loops() -> bool:
    for n, r in ((20, 6), (21, 10), (2, 1), (9, 3)):
        metric, importance, _ = drawn(n, n)
        stays, leaves, partner = pairs(metric, importance, r)
        x = torch.nn.functional.normalize(metric, dim=-1)
        alike = (x @ x.mT).masked_fill(torch.eye(n).bool(), -9)
        rank = redundancy_rank(torch.maximum(alike, alike.mT).amax(-1))
        for b in range(2):
            expected = by_loops(metric[b], importance[b], rank[b].tolist(), r)
            found = dict(zip(leaves[b].tolist(), partner[b].tolist(), strict=True))
            if found != expected or sorted({*range(n)} - set(found)) != stays[b].tolist():
                return False
    return True


def test_pairs_are_those_of_the_definition() -> None:
    assert same_as_loops()


def test_ranks_go_from_the_most_redundant_on() -> None:
    highest = torch.rand(3, 40, generator=torch.Generator().manual_seed(0))
    rank = redundancy_rank(highest)
    for scores, places in zip(highest.tolist(), rank.tolist(), strict=True):
        assert sorted(range(40), key=lambda i: places[i]) == sorted(
            range(40), key=lambda i: -scores[i]
        )


def test_the_two_of_a_pair_never_leave_both_for_one_another() -> None:
    for seed in range(20):
        _, leaves, partner = pairs(*drawn(16, seed)[:2], 8)
        for gone, into in zip(leaves.tolist(), partner.tolist(), strict=True):
            assert not set(gone) & set(into)


def test_a_guided_mean_by_hand() -> None:
    # 0 and 2 merge into 1: their shares are 1 / (1 + e) and 1 / (1 + 1).
    importance = torch.tensor([[0.0, 1.0, 1.0]])
    size = torch.tensor([[2.0, 3.0, 5.0]])
    one, both = torch.tensor([[1]]), torch.tensor([[0, 2]])
    made = guided(one, both, torch.tensor([[1, 1]]), importance, size)
    share = 1 / (1 + torch.tensor(1.0).exp())
    expected = torch.tensor([[2 * share * 2, (2 - 2 * share) * 3, 5.0]]) / 10
    torch.testing.assert_close(made.weight, expected)
    x = torch.tensor([[[1.0], [10.0], [100.0]]])
    total = (4 * share + (2 - 2 * share) * 30 + 500) / 10
    torch.testing.assert_close(made.selection().apply(x), total[None, None, None])


def test_equal_importance_is_a_mean_weighted_by_size() -> None:
    metric, _, size = drawn(14)
    merge = merge_guided(metric, torch.ones_like(size), size, 9)
    total = torch.zeros(2, 9).scatter_add_(1, merge.into, size)
    torch.testing.assert_close(merge.weight, size / total.gather(1, merge.into))


@pytest.mark.parametrize("k", [1, 2, 9, 19])
def test_any_count_is_reached_and_rounds_compose(k: int) -> None:
    metric, importance, size = drawn(20)
    merge = merge_guided(metric, importance, size, k)
    assert merge.rows.shape == (2, k)
    assert (merge.rows.diff() > 0).all()
    assert torch.equal(merge.into.gather(1, merge.rows), torch.arange(k).expand(2, k))
    assert torch.equal(merge.selection().total(size).sum(1), size.sum(1))
    if k == 9:
        first = merge_guided(metric, importance, size, 10)
        left = first.selection().total(size)
        share = complete.Merge(first.rows, first.into, size / left.gather(1, first.into))
        mean = share.selection().apply(metric)
        second = merge_guided(mean, importance.gather(1, first.rows), left, 9)
        x = torch.randn(2, 20, 3, generator=torch.Generator().manual_seed(9))
        twice = second.selection().apply(first.selection().apply(x))
        torch.testing.assert_close(merge.selection().apply(x), twice)


def test_broken_tokens_resemble_none() -> None:
    metric, importance, size = drawn(12)
    metric[0, 3], importance[1, 5] = float("nan"), float("nan")
    merge = merge_guided(metric, importance, size, 7)
    assert merge.weight.isfinite().all()
    assert int((merge.into[0] == merge.into[0, 3]).sum()) == 1


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("redundancy_rank", lambda highest: highest.argsort(dim=1).argsort(dim=1)),
        ("topk_sorted", lambda scores, k: torch.arange(k).expand(len(scores), k)),
    ],
)
def test_faults_are_noticed(name: str, fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(complete, name, fault)
    assert not same_as_loops()
