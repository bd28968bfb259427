from __future__ import annotations

import pytest
import torch

from vtprune.errors import InputError
from vtprune.scoring.guidance import guidance, unit_range
from vtprune.types import Joint, Signals

NAN = float("nan")
TOKENS = torch.tensor([[[2.0, 0.0], [3.0, 3.0], [0.0, 1.0]]])
WORDS = [torch.tensor([[5.0, 0.0], [4.0, 0.0]])]


def test_words_are_alike_and_patches_of_a_text_tower_unlike() -> None:
    wanted = torch.tensor([[1.0, 0.5**0.5, 0.0]])
    torch.testing.assert_close(guidance(Signals(TOKENS, text=WORDS)), wanted)
    other = torch.zeros(1, 3, 7)
    joint = Signals(other, values={Joint(22): TOKENS}, text=WORDS)
    torch.testing.assert_close(guidance(joint), -wanted)


def test_without_text_it_says_so() -> None:
    with pytest.raises(InputError, match="hold no text"):
        guidance(Signals(TOKENS))


def test_the_range_is_that_of_the_image() -> None:
    x = torch.tensor([[1.0, 2.0, 3.0], [3.0, 4.0, 5.0], [7.0, 7.0, 7.0]])
    alone = unit_range(x, None)
    wanted = torch.tensor([[0.0, 0.5, 1.0], [0.0, 0.5, 1.0], [1.0, 1.0, 1.0]])
    torch.testing.assert_close(alone, wanted, atol=1e-6, rtol=0)
    assert float(alone[0, 0]) == pytest.approx(5e-7)
    tiles = unit_range(x, torch.tensor([4, 4, 1]))
    wanted = torch.tensor([[0.0, 0.25, 0.5], [0.5, 0.75, 1.0], [1.0, 1.0, 1.0]])
    torch.testing.assert_close(tiles, wanted, atol=1e-6, rtol=0)


def test_nan_stays_where_it_is() -> None:
    got = unit_range(torch.tensor([[1.0, NAN, 3.0], [NAN, NAN, NAN]]), None)
    assert got.isnan().tolist() == [[False, True, False], [True, True, True]]
    assert float(got[0, 2]) == pytest.approx(1.0)
