"""TRIM keeps by relevance alone, repeated tokens or not."""

from __future__ import annotations

import torch

import vtprune
from vtprune.types import Joint, Signals

# Cosines to the word: 1, 1, 0.6, 0, -1.
TOKENS = torch.tensor([[[3.0, 0.0], [1.0, 0.0], [0.3, 0.4], [0.0, 9.0], [-2.0, 0.0]]])
WORD = [torch.tensor([[1.0, 0.0]])]


def test_words_of_the_language_model_take_what_is_like_them():
    assert vtprune.select("trim", keep=1, signals=Signals(TOKENS, text=WORD)).rows.tolist() == [[0]]
    kept = vtprune.select("trim", keep=3, signals=Signals(TOKENS, text=WORD))
    assert kept.rows.tolist() == [[0, 1, 2]]


def test_a_text_tower_takes_what_is_unlike():
    signals = Signals(torch.zeros(1, 5, 7), values={Joint(22): TOKENS}, text=WORD)
    assert vtprune.select("trim", keep=2, signals=signals).rows.tolist() == [[3, 4]]


def test_several_words_count_alike():
    words = [torch.tensor([[7.0, 0.0], [0.0, 0.1]])]  # mean cosines 0.5, 0.5, 0.7, 0.5, -0.5
    assert vtprune.select("trim", keep=1, signals=Signals(TOKENS, text=words)).rows.tolist() == [
        [2]
    ]
