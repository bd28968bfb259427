"""Tokens that are kept, and the rest merged into evenly spaced ones of it."""

from __future__ import annotations

import pytest
import torch

from vtprune.scoring.contextual import merge_rest


def test_a_case_by_hand() -> None:
    score = torch.tensor([[0.0, 9.0, 0.0, 8.0, 0.0, 0.0, 0.0]])
    keys = torch.eye(2)[torch.tensor([[0, 0, 1, 1, 0, 1, 0]])]
    tokens = torch.tensor([[1.0, 2, 4, 8, 16, 32, 64]])[..., None]
    selection = merge_rest(score, keys, n_top=2, n_merged=2)
    # Of 0 2 4 5 6 every second is a target: 0 and 4, both like 6, which goes to the first.
    assert selection.rows.tolist() == [[1, 3, 0, 4]]
    assert selection.apply(tokens)[0, :, 0].tolist() == pytest.approx([2, 8, 1 + 100 / 3, 16])
    averaged = merge_rest(score, keys, n_top=2, n_merged=2, mean=True)
    assert averaged.apply(tokens)[0, :, 0].tolist() == pytest.approx([2, 8, 101 / 4, 16])


def test_a_cls_comes_first_and_none_need_be_merged() -> None:
    score, keys = torch.tensor([[1.0, 3, 2]]), torch.ones(1, 3, 2)
    selection = merge_rest(score, keys, n_top=2, n_merged=0, has_cls=True)
    assert selection.rows.tolist() == [[-1, 1, 2]]
    tokens = torch.tensor([[1.0, 2, 3, 7]])[..., None]  # the last one is [CLS]
    assert selection.apply(tokens)[0, :, 0].tolist() == [7, 2, 3]
