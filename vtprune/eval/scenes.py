"""Scenes of handwritten digits and drawn shapes, with questions about single regions.

A scene is a 128 x 128 image on an 8 x 8 lattice of cells: single digits, shapes, and a number of
several digits in a row, each in one of eight colors, on a cluttered background. Every question
needs the pixels of one or a few things, so dropping the wrong visual tokens costs the answer.
Digits come from scikit-learn's bundled data set (8 x 8 scans of handwriting); the digits used for
training and for testing are disjoint.

Everything is a function of ``(level, split, seed)``. Levels, questions and seeds were fixed before
any strategy was scored.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vtprune.errors import ConfigError
from vtprune.eval.scene_pixels import render
from vtprune.eval.scene_questions import KINDS, Question, all_questions
from vtprune.eval.scene_things import CELL, COLORS, DIGITS, N_CELLS, SHAPES, SIZE, Thing

SPLITS = ("train", "test")


@dataclass(frozen=True)
class Scene:
    """``pixels`` is ``[128, 128, 3]`` uint8; ``questions`` are all that the scene allows."""

    pixels: NDArray[np.uint8]
    things: tuple[Thing, ...]
    questions: tuple[Question, ...]

    @property
    def image(self) -> Image.Image:
        return Image.fromarray(self.pixels)


@dataclass(frozen=True)
class Level:
    """How a scene is laid out; pairs are (least, most).

    ``digits`` stand alone, ``numbers`` have ``length`` digits. Between any two of these and the
    ``shapes`` there are ``gap`` free cells, and each leaves its cell by up to ``jitter`` pixels.
    ``own_color`` gives each a color that no other has. ``asks`` demands that every kind of
    question can be asked.
    """

    digits: tuple[int, int]
    shapes: tuple[int, int]
    numbers: tuple[int, int]
    length: tuple[int, int]
    jitter: int
    lines: tuple[int, int]
    noise: float
    gap: int = 1
    own_color: bool = True
    asks: bool = True


LEVELS = {
    "easy": Level((1, 2), (1, 2), (1, 1), (2, 2), jitter=2, lines=(2, 6), noise=3),
    "standard": Level((1, 3), (1, 3), (1, 1), (2, 3), jitter=4, lines=(6, 13), noise=6),
    "hard": Level(
        (2, 4), (2, 4), (1, 1), (3, 4), jitter=4, lines=(14, 24), noise=10, own_color=False
    ),
}
# Many targets per image teach a tower to read far sooner than a few; not used for questions.
DENSE = Level(
    *((14, 20), (8, 12), (3, 4), (2, 4)),
    **{"jitter": 2, "lines": (6, 13), "noise": 6, "gap": 0, "own_color": False, "asks": False},
)


def make_scene(seed: int, split: str = "test", level: str | Level = "standard") -> Scene:
    """Returns the scene number ``seed`` of ``split``.

    Raises:
        ConfigError: ``split`` is neither ``train`` nor ``test``, ``level`` is not in ``LEVELS``, or
            ``seed`` is negative.
    """
    if split not in SPLITS:
        raise ConfigError(f"split={split!r} is not known; choose one of {SPLITS}.")
    if seed < 0:
        raise ConfigError(f"seed={seed} must not be negative.")
    if isinstance(level, str):
        if level not in LEVELS:
            raise ConfigError(f"level={level!r} is not known; choose one of {tuple(LEVELS)}.")
        level = LEVELS[level]
    rng = np.random.default_rng([SPLITS.index(split), seed])
    things, questions = _layout(rng, level)
    return Scene(render(things, rng, split, level.lines, level.noise), things, questions)


def pick_question(scene: Scene, seed: int, kind: str | None = None) -> Question:
    """Returns one question of ``kind``; without it the kinds take turns with ``seed``.

    So do "yes" and "no" of presence, of which a scene has one more often than the other.
    """
    rng = np.random.default_rng([len(SPLITS), seed])
    turn = seed
    if kind is None:
        kind, turn = KINDS[seed % len(KINDS)], seed // len(KINDS)
    fitting = [q for q in scene.questions if q.kind == kind]
    if kind == "presence":
        wanted = "yes" if turn % 2 == 0 else "no"
        fitting = [q for q in fitting if q.answer == wanted]
    return fitting[int(rng.integers(len(fitting)))]


def _layout(
    rng: np.random.Generator, level: Level
) -> tuple[tuple[Thing, ...], tuple[Question, ...]]:
    """Draws things until they allow every question; counts are drawn once, so they stay even."""
    n_digits, n_shapes, n_numbers = (
        int(rng.integers(low, high + 1))
        for low, high in (level.digits, level.shapes, level.numbers)
    )
    lengths = rng.integers(level.length[0], level.length[1] + 1, n_numbers)
    while True:
        groups = [
            *([str(d) for d in rng.choice(DIGITS, n)] for n in lengths),
            *([str(d)] for d in rng.choice(DIGITS, n_digits)),
            *([str(s)] for s in rng.choice(SHAPES, n_shapes)),
        ]
        things = _place(rng, groups, level)
        questions = all_questions(things)
        if not level.asks or {q.kind for q in questions} == set(KINDS):
            return things, tuple(questions[i] for i in rng.permutation(len(questions)))


def _place(rng: np.random.Generator, groups: list[list[str]], level: Level) -> tuple[Thing, ...]:
    """Puts each group into neighbouring cells of a row, in one color and with one shift."""
    starts = _cells(rng, [len(group) for group in groups], level.gap)
    colors = rng.choice(list(COLORS), len(groups), replace=not level.own_color)
    shifts = rng.integers(-level.jitter, level.jitter + 1, (len(groups), 2))
    things = []
    for names, (row, col), color, (dy, dx) in zip(groups, starts, colors, shifts, strict=True):
        # The whole group stays inside the image, so its digits keep their distance.
        x = int(np.clip(col * CELL + dx, 0, SIZE - CELL * len(names)))
        y = int(np.clip(row * CELL + dy, 0, SIZE - CELL))
        for i, name in enumerate(names):
            things.append(Thing(name, str(color), row, col + i, x + i * CELL, y))
    return tuple(things)


def _cells(rng: np.random.Generator, lengths: list[int], gap: int) -> list[tuple[int, int]]:
    """Draws where each group starts, with at least ``gap`` free cells around it."""
    while True:
        free = np.ones((N_CELLS, N_CELLS), dtype=bool)
        starts: list[tuple[int, int]] = []
        for length in lengths:
            fits = [
                (row, col)
                for row in range(N_CELLS)
                for col in range(N_CELLS - length + 1)
                if free[row, col : col + length].all()
            ]
            if not fits:
                break
            row, col = fits[int(rng.integers(len(fits)))]
            free[max(0, row - gap) : row + gap + 1, max(0, col - gap) : col + length + gap] = False
            starts.append((row, col))
        else:
            return starts
