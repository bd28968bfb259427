"""Outliers, orders and merged tokens, by hand and against plain loops."""

from __future__ import annotations

import pytest
import torch

from vtprune.scoring.merging import absorb, gridded, into_nearest, outlier_share


def test_outliers_are_above_the_upper_fence():
    even = torch.arange(9.0)  # quartiles 2 and 6, fence 12
    above, below = even.clone(), even.clone()
    above[7:], below[7:] = torch.tensor([20.0, 12.5]), torch.tensor([12.5, 12.0])
    nan = torch.full((9,), float("nan"))
    shares = outlier_share(torch.stack([even, above, below, nan]))
    assert shares == [0.0, 2 / 9, 1 / 9, 0.0]


def test_the_best_then_a_grid_then_the_rest():
    score = torch.tensor([[0.0, 1, 2, 9, 8, 3, 4, 5, 6]]).expand(2, 9)
    order, n_kept = gridded(score, [2, 1], [4, 3])
    # Row 0: 3 and 4 by score, 0 of the grid 0, 4 (8 is the last patch). Row 1: 3; 0 and 6.
    assert order.tolist() == [[3, 4, 0, 8, 7, 6, 5, 2, 1], [3, 0, 6, 4, 8, 7, 5, 2, 1]]
    assert n_kept == [3, 3]


def test_absorbing_by_hand():
    keys = torch.tensor([[[1.0, 0.0], [0.9, 0.1], [0.0, 2.0], [0.1, 3.0], [-1.0, 0.0]]])
    weight = torch.tensor([[0.5, 0.2, 0.1, 0.3, float("nan")]])
    x = torch.tensor([[[1.0], [10.0], [100.0], [1000.0], [10000.0]]])
    selection = absorb(torch.tensor([[3, 0]]), keys, weight, 1)
    assert selection.rows.tolist() == [[3, 0, -1]]
    # 3 takes in 2 with 0.1; 0 takes in 1 with 0.2; 1, 2 and 4 (whose weight is unknown) leave.
    assert selection.apply(x)[0, :, 0].tolist() == pytest.approx([1010.0, 3.0, 12.0])


def test_kept_tokens_are_neighbours_too_and_count_as_they_were():
    keys = torch.tensor([[[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]]])
    weight = torch.tensor([[0.5, 0.25, 0.125]])
    x = torch.tensor([[[1.0], [10.0], [100.0]]])
    selection = absorb(torch.tensor([[0, 1]]), keys, weight, 1)
    assert selection.apply(x)[0, :, 0].tolist() == pytest.approx([3.5, 10.5, 12.5])


@pytest.mark.parametrize(("k", "m"), [(0, 4), (1, 0), (5, 4), (18, 32)])
def test_absorbing_random_tokens(k, m):
    generator = torch.Generator().manual_seed(k)
    keys, x = (torch.randn(2, 20, d, generator=generator) for d in (8, 6))
    weight = torch.rand(2, 20, generator=generator)
    kept = torch.stack([torch.randperm(20, generator=generator)[:k] for _ in range(2)])
    out = absorb(kept, keys, weight, m).apply(x)
    unit = torch.nn.functional.normalize(keys, dim=-1)
    for b in range(2):
        for place, i in enumerate(kept[b].tolist()):
            others = [j for j in range(20) if j != i]
            others.sort(key=lambda j: -float(unit[b, i] @ unit[b, j]))
            added = sum((weight[b, j] * x[b, j] for j in others[:m]), torch.zeros(6))
            torch.testing.assert_close(out[b, place], x[b, i] + added)
        left = sorted(set(range(20)) - set(kept[b].tolist()))
        torch.testing.assert_close(out[b, k], (weight[b, left, None] * x[b, left]).sum(0))


def test_what_leaves_is_averaged_into_what_it_resembles_most():
    tokens = torch.tensor([[[2.0, 0.0], [1.0, 0.1], [0.0, 1.0], [3.0, 0.0], [0.1, 5.0]]])
    merged = into_nearest(torch.tensor([[0, 2]]), tokens)
    assert merged.rows.tolist() == [[0, 2]]
    mean = torch.stack([tokens[0, [0, 1, 3]].mean(0), tokens[0, [2, 4]].mean(0)])
    torch.testing.assert_close(merged.apply(tokens)[0], mean)
    assert into_nearest(torch.tensor([[2]]), tokens).total(torch.ones(1, 5)).tolist() == [[5.0]]
