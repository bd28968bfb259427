"""What stands in a scene: digits and shapes in cells of a lattice, and how they lie together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

SIZE = 128  # pixels
CELL = 16
N_CELLS = SIZE // CELL
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (230, 40, 40),
    "green": (40, 200, 60),
    "blue": (70, 100, 255),
    "yellow": (245, 225, 50),
    "purple": (190, 60, 220),
    "cyan": (60, 220, 230),
    "orange": (255, 140, 30),
    "white": (245, 245, 245),
}
DIGITS = tuple("0123456789")
SHAPES = ("circle", "square", "triangle", "cross")
NAMES = DIGITS + SHAPES
# Steps in (row, col) to what lies that way.
SIDES = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
REACH = 2  # cells: what is farther away is not beside


@dataclass(frozen=True)
class Thing:
    """One digit or shape. ``x``, ``y`` is the top-left pixel of its box, ``size`` a side of it."""

    name: str
    color: str
    row: int
    col: int
    x: int
    y: int
    size: int = CELL

    @property
    def is_digit(self) -> bool:
        return self.name in DIGITS


def numbers(things: Sequence[Thing]) -> list[list[Thing]]:
    """Returns every number: two or more digits of one color in neighbouring cells of a row."""
    at = {(t.row, t.col): t for t in things if t.is_digit}

    def following(t: Thing, step: int) -> Thing | None:
        other = at.get((t.row, t.col + step))
        return other if other is not None and other.color == t.color else None

    found = []
    for first in at.values():
        if following(first, -1) is None:
            run = [first]
            while (after := following(run[-1], 1)) is not None:
                run.append(after)
            found.append(run)
    return [run for run in found if len(run) > 1]


def beside(things: Sequence[Thing], thing: Thing, side: str) -> Thing | None:
    """Returns the nearest thing on that side in the same row or column, within ``REACH`` cells."""
    at = {(t.row, t.col): t for t in things}
    down, right = SIDES[side]
    for step in range(1, REACH + 1):
        other = at.get((thing.row + step * down, thing.col + step * right))
        if other is not None:
            return other
    return None
