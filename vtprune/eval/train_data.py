"""Training batches from scenes: pixels, targets per patch and per image, packed questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vtprune.eval import scenes
from vtprune.eval.scene_questions import KINDS, Question
from vtprune.eval.scene_things import COLORS, NAMES, SIDES, SIZE, Thing, beside, numbers

IGNORE = -100
TOKEN = 8  # pixels that a visual token covers, each way
N_BLOCKS, BLOCK = 16, 13  # questions per image; words per question block at most
LONGEST = 4  # digits of a number whose places are told apart
MOST = 9  # things that are counted
COLOR_NAMES = tuple(COLORS)
# How many questions of each kind an image is asked before any is asked more.
SHARES = {"number": 1, "count": 1, "relation": 3, "read": 2, "shape": 2, "presence": 4, "color": 3}


@dataclass
class Batch:
    """One batch of scenes, int64 but for the pixels and ``present``.

    ``pixels`` ``[B, 3, H, W]``, and ``native`` of 128 x 128; per visual token, that is a square of
    8 x 8 of these pixels, ``[B, N]``: ``thing`` (0 = background), ``color``,
    ``place`` in a number (0 = in none); ``sides`` ``[B, 4, N]``: what is beside (0 = nothing);
    ``present`` ``[B, C]``; ``counts`` ``[B, 2]``: digits, shapes; ``ids``, ``labels``
    ``[B, N_BLOCKS * BLOCK]``, and ``early``, the answer's first word from the question's last
    telling word on; ``kinds`` ``[B, N_BLOCKS]``.
    """

    pixels: Tensor
    native: Tensor
    thing: Tensor
    color: Tensor
    place: Tensor
    sides: Tensor
    present: Tensor
    counts: Tensor
    ids: Tensor
    labels: Tensor
    early: Tensor
    kinds: Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(**{name: value.to(device) for name, value in vars(self).items()})


def owners(things: Sequence[Thing], size: tuple[int, int], side: int = SIZE) -> NDArray[np.int64]:
    """Per visual token ``[N]`` of a scene of ``side`` pixels, shown at ``size`` (height, width).

    The index of the thing that covers most of it, -1 = none, IGNORE = an edge, that is less than a
    quarter of it is covered.
    """
    rows, cols = (np.linspace(0, side, pixels // TOKEN + 1) for pixels in size)
    best = np.zeros((len(rows) - 1, len(cols) - 1))
    owner = np.full(best.shape, -1, dtype=np.int64)
    for i, t in enumerate(things):
        wide = np.minimum(cols[1:], t.x + t.size) - np.maximum(cols[:-1], t.x)
        high = np.minimum(rows[1:], t.y + t.size) - np.maximum(rows[:-1], t.y)
        cover = high.clip(0)[:, None] * wide.clip(0)[None] / (rows[1] * cols[1])
        mine = cover > best
        owner[mine] = np.where(cover >= 0.25, i, IGNORE)[mine]
        best = np.maximum(best, cover)
    return owner.flatten()


def thing_targets(things: Sequence[Thing]) -> NDArray[np.int64]:
    """Per thing ``[T, 7]``: 1 + name, color, place in its number, 1 + name on each side."""
    places = {t: 1 + i for run in numbers(things) for i, t in enumerate(run)}
    rows = []
    for t in things:
        place = places.get(t, 0)
        row = [_name(t), COLOR_NAMES.index(t.color), place if place <= LONGEST else IGNORE]
        rows.append([*row, *(_name(beside(things, t, side)) for side in SIDES)])
    return np.array(rows)


def token_targets(things: Sequence[Thing], size: tuple[int, int]) -> NDArray[np.int64]:
    """Per token ``[7, N]`` the targets of its thing; the background has a name, 0, and no more."""
    owner = owners(things, size)
    background = np.array([[0, *[IGNORE] * 6]])
    edge = np.full((1, 7), IGNORE)
    table = np.concatenate([thing_targets(things), background, edge])
    return table[np.where(owner == IGNORE, len(things) + 1, owner % (len(things) + 1))].T


def image_targets(things: Sequence[Thing]) -> tuple[NDArray[np.float32], list[int]]:
    """Presence of every name and color, and the numbers of digits and shapes."""
    seen = {t.name for t in things} | {t.color for t in things}
    present = np.array([n in seen for n in (*NAMES, *COLOR_NAMES)], dtype=np.float32)
    digits = sum(t.is_digit for t in things)
    return present, [n if n <= MOST else IGNORE for n in (digits, len(things) - digits)]


class Writer:
    """Turns scenes into batches; the scenes of a batch take turns with ``levels``."""

    def __init__(self, tokenizer: Any, levels: Sequence[str | scenes.Level], batch: int) -> None:
        self.tokenizer = tokenizer
        self.levels = levels
        self.batch = batch

    def __call__(self, first: int, size: tuple[int, int]) -> Batch:
        """The training scenes from number ``first`` on, shown at ``size`` (height, width)."""
        made = [
            scenes.make_scene(i, "train", self.levels[i % len(self.levels)])
            for i in range(first, first + self.batch)
        ]
        native = scale([s.image for s in made])
        tokens = torch.from_numpy(np.stack([token_targets(s.things, size) for s in made]))
        image = [image_targets(s.things) for s in made]
        asked = [self._questions(s) for s in made]
        blocks = torch.tensor([rows for rows, _ in asked]).flatten(2)  # [B, 3, ...]
        return Batch(
            native if size == (SIZE, SIZE) else scale([resize(s.image, size) for s in made]),
            native,
            tokens[:, 0],
            tokens[:, 1],
            tokens[:, 2],
            tokens[:, 3:],
            torch.from_numpy(np.stack([present for present, _ in image])),
            torch.tensor([counts for _, counts in image]),
            blocks[:, 0],
            blocks[:, 1],
            blocks[:, 2],
            torch.tensor([kinds for _, kinds in asked]),
        )

    def _questions(self, scene: scenes.Scene) -> tuple[list[list[list[int]]], list[int]]:
        """Ids, labels and early labels ``[3, N_BLOCKS, BLOCK]``; kinds ``[N_BLOCKS]``."""
        chosen = choose(scene.questions)
        lacking = N_BLOCKS - len(chosen)
        blocks = [self._block(question) for question in chosen]
        blocks += [[[0] * BLOCK, [IGNORE] * BLOCK, [IGNORE] * BLOCK]] * lacking
        kinds = [KINDS.index(question.kind) for question in chosen] + [IGNORE] * lacking
        return [list(rows) for rows in zip(*blocks, strict=True)], kinds

    def _block(self, question: Question) -> list[list[int]]:
        """Ids, labels and early labels of one question; a label is the id that follows."""
        words = question.text.split()
        telling = len(words) - (3 if words[-2] == "one" else 2)  # "red" of "the red one ?"
        return block(self.tokenizer, question, telling)


def block(tokenizer: Any, question: Question, telling: int) -> list[list[int]]:
    """Ids, labels and early labels of a question whose word number ``telling`` says what is meant.

    A label is the id that follows.
    """
    asked = tokenizer(question.text + " assistant :")["input_ids"]
    answer = tokenizer(question.answer + " </s>")["input_ids"]
    ids = asked + answer
    labels = [IGNORE] * (len(asked) - 1) + answer + [IGNORE]
    early = [IGNORE] * telling + answer[:1] * (len(asked) - 1 - telling)
    return [
        ids + [0] * (BLOCK - len(ids)),
        labels + [IGNORE] * (BLOCK - len(labels)),
        early + [IGNORE] * (BLOCK - len(early)),
    ]


def resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Returns the image at ``size`` (height, width) pixels."""
    return image.resize((size[1], size[0]), Image.Resampling.BICUBIC)


def scale(images: Sequence[Image.Image]) -> Tensor:
    """Images of one size as ``[B, 3, H, W]`` from -1 to 1, as both processors scale them."""
    stacked = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return stacked.permute(0, 3, 1, 2).float() / 127.5 - 1


def choose(questions: Sequence[Question]) -> list[Question]:
    """Returns up to ``N_BLOCKS`` questions: the share of each kind first, then the rest."""
    first, rest = [], []
    left = dict(SHARES)
    answers_left = {"yes": 2, "no": 2}  # of presence, as many of each
    for question in questions:
        kind, answer = question.kind, question.answer
        if left[kind] and (kind != "presence" or answers_left[answer]):
            first.append(question)
            left[kind] -= 1
            if kind == "presence":
                answers_left[answer] -= 1
        elif kind != "presence":
            rest.append(question)
    return [*first, *rest][:N_BLOCKS]


def _name(thing: Thing | None) -> int:
    return 0 if thing is None else 1 + NAMES.index(thing.name)
