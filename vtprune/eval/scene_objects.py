"""Pictures of one handwritten digit or drawn shape, classified by what it is and by its color.

A picture has 112 x 112 pixels; its thing has 16 to 36 a side and lies anywhere on the clutter of
the scenes, so that few of the visual tokens tell the class and a method has to find them. The 14
names in 8 colors are 112 classes, and any 112 pictures in a row show each once. Digits for
training and for testing are disjoint, as in the scenes.

Everything is a function of ``(number, split, crowd)``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vtprune.errors import ConfigError
from vtprune.eval.scene_pixels import render
from vtprune.eval.scene_things import CELL, COLORS, NAMES, Thing
from vtprune.eval.scenes import SPLITS

SIDE = 112  # pixels of a picture
SIZES = (16, 36)  # least and most pixels of a thing
LINES, NOISE = (6, 13), 6.0  # of a standard scene
CLASSES = tuple(f"{color} {name}" for name in NAMES for color in COLORS)
STRIDE = 41  # between the classes of pictures in a row; changes name and color, prime to 112
STREAM = 16  # of random numbers, apart from those of the scenes


@dataclass(frozen=True)
class Picture:
    """``pixels`` is ``[112, 112, 3]`` uint8; the first of the ``things`` gives the class."""

    pixels: NDArray[np.uint8]
    things: tuple[Thing, ...]

    @property
    def image(self) -> Image.Image:
        return Image.fromarray(self.pixels)

    @property
    def label(self) -> int:
        return class_of(self.things[0])


def class_of(thing: Thing) -> int:
    """Returns the index in ``CLASSES``."""
    return CLASSES.index(f"{thing.color} {thing.name}")


def make_picture(number: int, split: str = "test", crowd: int = 1) -> Picture:
    """Returns the picture ``number`` of ``split``.

    With a ``crowd`` above 1 so many things are thrown at the picture, and those stay that touch
    none before; a tower learns to read from these sooner.

    Raises:
        ConfigError: ``split`` is neither ``train`` nor ``test``, ``number`` is negative, or
            ``crowd`` is less than 1.
    """
    if split not in SPLITS:
        raise ConfigError(f"split={split!r} is not known; choose one of {SPLITS}.")
    if number < 0:
        raise ConfigError(f"number={number} must not be negative.")
    if crowd < 1:
        raise ConfigError(f"crowd={crowd}, but a picture shows something. Give 1 or more.")
    rng = np.random.default_rng([STREAM, SPLITS.index(split), number])
    things = [_throw(rng, STRIDE * number % len(CLASSES))]
    for _ in range(crowd - 1):
        other = _throw(rng, int(rng.integers(len(CLASSES))))
        if not any(_touch(other, thing) for thing in things):
            things.append(other)
    return Picture(render(things, rng, split, LINES, NOISE, SIDE), tuple(things))


def _throw(rng: np.random.Generator, index: int) -> Thing:
    """A thing of the class ``index``, of any size and anywhere."""
    color, name = CLASSES[index].split()
    size = int(rng.integers(SIZES[0], SIZES[1] + 1))
    x, y = (int(v) for v in rng.integers(0, SIDE - size + 1, 2))
    return Thing(name, color, y // CELL, x // CELL, x, y, size)


def _touch(a: Thing, b: Thing) -> bool:
    beside = a.x >= b.x + b.size or b.x >= a.x + a.size
    above = a.y >= b.y + b.size or b.y >= a.y + a.size
    return not (beside or above)
