"""Which words rate the image, and what distance alone makes of attention."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from vtprune.errors import InputError
from vtprune.scoring.raters import distance_bias, raters
from vtprune.types import Inside, Likeness, Quantity, Signals, Turned


def signals(*after: Mapping[Any, Tensor], own: Tensor | None = None) -> Signals:
    n = len(after)
    values: dict[Quantity, Tensor] = {} if own is None else {Turned(1): own}
    inside = Inside(0, (2,), 4, (3,) * n, after=after)
    return Signals(torch.zeros(n, 3, 1), values=values, inside=inside)


def test_raters_are_liked_more_than_the_mean() -> None:
    rows = ([0.1, 0.6, 0.3], [0.5, 0.5], [1.0], [])
    given = signals(*({Likeness(0): torch.tensor(row)} for row in rows))
    assert raters(given, 3).tolist() == [[0, 1, 0], [1, 1, 0], [1, 0, 0], [1, 0, 0]]


def turned(places: Tensor, width: int) -> Tensor:
    angles = places[:, None] * 1e4 ** -(torch.arange(0, width, 2) / width)
    angles = torch.cat([angles, angles], dim=1)
    half = width // 2
    sin = angles.sin()
    return angles.cos() + torch.cat([-sin[:, :half], sin[:, half:]], dim=1)


@pytest.mark.parametrize(("distance", "wanted"), [(0, 11.31), (50, 6.18), (300, 3.47), (650, 2.17)])
def test_the_bias_of_a_distance(distance: int, wanted: float) -> None:
    own = turned(torch.tensor([5.0]), 128)[None]
    after = {Turned(1): turned(torch.tensor([5.0 + distance]), 128)}
    found = distance_bias(signals(after, own=own), 2)
    assert found.shape == (1, 1, 2)
    assert found[0, 0].tolist() == pytest.approx([wanted, 1.0], abs=0.01)


def test_far_away_it_becomes_negative_unless_it_ends_before() -> None:
    own = turned(torch.tensor([0.0]), 128)[None]
    after = {Turned(1): turned(torch.tensor([1707.0, 1706.0]), 128)}
    given = signals(after, own=own)
    signed = distance_bias(given, 2, signed=True)[0, 0].tolist()
    assert signed[0] < 0 < signed[1]
    assert distance_bias(given, 2)[0, 0].tolist() == [0.5, 0.5]


def test_without_text_the_last_visual_token_asks() -> None:
    own = turned(torch.tensor([0.0, 1.0, 2.0]), 8)[None]
    given = signals({Turned(1): own[0, :0]}, own=own)
    found = distance_bias(given, 1)[0, :, 0]
    assert found[2] == pytest.approx(math.sqrt(8))
    assert found[0] < found[1] < found[2]


def test_what_is_missing_is_said() -> None:
    with pytest.raises(InputError, match="holds no Likeness"):
        raters(signals({}), 1)
    with pytest.raises(InputError, match="holds no Likeness"):
        raters(Signals(torch.zeros(1, 3, 1)), 1)
