from __future__ import annotations

import torch

from vtprune.scoring.text import relevance


def test_the_mean_cosine_to_all_texts_of_the_row() -> None:
    tokens = torch.tensor([[[2.0, 0.0], [0.0, 3.0]], [[1.0, 1.0], [0.0, 0.0]]])
    text = [torch.tensor([[4.0, 0.0], [0.0, 1.0], [9.0, 0.0]]), torch.tensor([[0.0, 2.0]])]
    wanted = torch.tensor([[2 / 3, 1 / 3], [0.5**0.5, 0.0]])
    torch.testing.assert_close(relevance(tokens, text), wanted)


def test_a_row_without_text_gives_zeros() -> None:
    assert relevance(torch.ones(1, 2, 3), [torch.zeros(0, 3)]).tolist() == [[0.0, 0.0]]
