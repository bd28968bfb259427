"""Captions of pictures with several things, and their words as ids.

A picture shows one to five things; its caption names them from left to right, such as "a red 7, a
blue circle and a white 3". Everything is a function of ``(number, split)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vtprune.errors import InputError
from vtprune.eval.scene_objects import CLASSES, Picture, make_picture
from vtprune.eval.scene_things import COLORS, NAMES, Thing

CROWD = 5  # things thrown at a picture, see ``make_picture``
START, END = "<start>", "<end>"
# Padding is 0. The end has the highest id: by that open_clip's text tower finds it.
WORDS = ("<pad>", START, "a", ",", "and", *COLORS, *NAMES, END)
IDS = {word: i for i, word in enumerate(WORDS)}
LENGTH = 2 + 4 * CROWD  # words of the longest caption, with its start and end
STREAM = 17  # of random numbers, apart from those of the pictures


@dataclass(frozen=True)
class Pair:
    """A picture and its caption."""

    picture: Picture
    caption: str


def make_pair(number: int, split: str = "test") -> Pair:
    """Returns the pair ``number`` of ``split``.

    Raises:
        ConfigError: ``split`` is neither ``train`` nor ``test``, or ``number`` is negative.
    """
    picture = make_picture(number, split, CROWD)
    return Pair(picture, caption(picture.things))


def caption(things: Sequence[Thing]) -> str:
    """Names the things from left to right."""
    return _said([f"{t.color} {t.name}" for t in _from_left(things)])


def altered(things: Sequence[Thing], number: int) -> str:
    """Returns a caption of ``things`` that is wrong about the color or the name of one."""
    rng = np.random.default_rng([STREAM, number])
    said = [[t.color, t.name] for t in _from_left(things)]
    one, part = said[int(rng.integers(len(said)))], int(rng.integers(2))
    others = [word for word in (COLORS, NAMES)[part] if word != one[part]]
    one[part] = others[int(rng.integers(len(others)))]
    return _said([" ".join(words) for words in said])


def tokenize(captions: Sequence[str] | str) -> Tensor:
    """Returns the ids of words ``[B, LENGTH]`` int64, as open_clip's tokenizers do.

    Raises:
        InputError: a word is not in ``WORDS``, or a caption is too long.
    """
    captions = [captions] if isinstance(captions, str) else captions
    ids = torch.zeros(len(captions), LENGTH, dtype=torch.int64)
    for row, text in zip(ids, captions, strict=True):
        words = [START, *text.replace(",", " ,").split(), END]
        odd = [word for word in words if word not in IDS]
        if odd:
            raise InputError(
                f"The caption {text!r} has {odd[0]!r}; known words are {', '.join(WORDS[2:-1])}."
            )
        if len(words) > LENGTH:
            raise InputError(
                f"The caption {text!r} has {len(words) - 2} words and commas; at most "
                f"{LENGTH - 2} are allowed. Name at most {CROWD} things."
            )
        row[: len(words)] = torch.tensor([IDS[word] for word in words])
    return ids


def presence(things: Sequence[Thing]) -> Tensor:
    """Returns ``[112]`` float32, 1 for each class that is there."""
    there = torch.zeros(len(CLASSES))
    there[[CLASSES.index(f"{t.color} {t.name}") for t in things]] = 1
    return there


def _from_left(things: Sequence[Thing]) -> list[Thing]:
    return sorted(things, key=lambda t: (2 * t.x + t.size, t.y))


def _said(names: list[str]) -> str:
    parts = [f"a {name}" for name in names]
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
