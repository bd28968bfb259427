"""Sinks, attention moved from them, and how much attention text and image get."""

from __future__ import annotations

import math

import pytest
import torch

from vtprune.scoring.dominance import dominance, stages
from vtprune.scoring.sinks import image_centric, rescale_attention, sink_score


def test_a_sink_is_large_in_the_dims_beside_its_own_scale():
    hidden = torch.ones(1, 3, 100)
    hidden[0, 1, 7] = 1000.0
    hidden[0, 2] *= 1000.0  # large everywhere
    score = sink_score(hidden.half(), [7, 3])
    assert score.dtype == torch.float32
    assert score[0].tolist() == pytest.approx([1.0, 1000 / math.sqrt(10_000.99), 1.0], rel=1e-3)
    assert sink_score(hidden, [3])[0, 1] < 1
    negative = hidden.clone()
    negative[0, 1, 7] = -1000.0
    assert torch.equal(sink_score(negative, [7]), sink_score(hidden, [7]))
    assert sink_score(torch.zeros(1, 1, 4), [0]).item() == 0


def test_heads_that_look_at_an_image_and_not_at_its_sinks():
    visual = torch.tensor([[False, True, True, False]])
    sinks = torch.tensor([[True, True, False, False]])
    rows = [
        [0.7, 0.1, 0.1, 0.1],
        [0.7, 0.05, 0.1, 0.15],
        [0.1, 0.5, 0.3, 0.1],
        [0.1, 0.3, 0.3, 0.3],
    ]
    found = image_centric(torch.tensor([rows]).unsqueeze(2), visual, sinks)
    assert found[0, :, 0].tolist() == [True, False, False, True]
    strict = image_centric(torch.tensor([rows]).unsqueeze(2), visual, sinks, share=0.6, least=0.1)
    assert strict[0, :, 0].tolist() == [False, True, False, False]


def test_what_leaves_a_sink_goes_to_others_in_proportion():
    attention = torch.tensor([0.5, 0.1, 0.3, 0.1])
    source, into = torch.tensor([1, 0, 0, 0]).bool(), torch.tensor([0, 1, 1, 0]).bool()
    moved = rescale_attention(attention[None], source, 0.4, into)
    assert moved[0].tolist() == pytest.approx([0.2, 0.1 + 0.3 / 4, 0.3 + 0.9 / 4, 0.1])
    whole = rescale_attention(attention[None], source, 3.0)  # multiplied, then made to sum to 1
    assert whole[0].tolist() == pytest.approx([x / 2 for x in (1.5, 0.1, 0.3, 0.1)])
    per_head = rescale_attention(
        attention.expand(2, 1, 4), source, torch.tensor([[[1.0]], [[0.0]]])
    )
    assert torch.equal(per_head[0, 0], attention)
    assert per_head[1, 0].tolist() == pytest.approx([0.0, 0.2, 0.6, 0.2])


def test_a_row_without_a_taker_stays_as_it_is():
    attention = torch.tensor([[0.6, 0.4, 0.0], [0.2, 0.4, 0.4]])
    moved = rescale_attention(attention, torch.tensor([True, False, False]), 0.5, attention[0] == 0)
    assert torch.equal(moved[0], attention[0])
    assert moved[1].tolist() == pytest.approx([0.1, 0.4, 0.5])


def test_dominance_by_hand():
    attention = torch.tensor([[0.5, 0.3, 0.1, 0.1], [0.5, 0.3, 0.1, 0.1]])
    text = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 0]]).bool()
    visual = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 0]]).bool()
    found = dominance(attention, text, visual)
    assert found.mdi.tolist() == pytest.approx([4.0, 3.0])
    assert found.text.tolist() == pytest.approx([0.8, 0.75])
    assert found.aei_text.tolist() == pytest.approx([1.6, 1.5])
    assert found.aei_visual.tolist() == pytest.approx([0.4, 0.5])
    none = dominance(attention, text, torch.zeros_like(visual))
    assert none.mdi.isnan().all()


def test_stages_are_the_first_the_middle_and_the_last_two():
    assert stages(torch.arange(8.0)).tolist() == [0.5, 3.5, 6.5]
    assert stages(torch.arange(7.0)).tolist() == [0.5, 2.5, 5.5]
