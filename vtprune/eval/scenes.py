"""Scenes of handwritten digits and drawn shapes, with questions about single regions.

A scene is a 128 x 128 image on an 8 x 8 lattice of cells: a few small things, each in one of eight
colors, on a cluttered background. Every question needs the pixels of one or a few things, so
dropping the wrong visual tokens costs the answer. Digits come from scikit-learn's bundled data set
(8 x 8 scans of handwriting); the digits used for training and for testing are disjoint.

Everything is a function of ``(split, seed)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

SIZE = 128
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
WORDS = (
    *("which", "digit", "is", "what", "color", "the", "there", "a", "how", "many", "digits"),
    *("left", "of", "one", "?", "yes", "no"),
)
TASKS = ("read", "color", "presence", "count", "left")
SPLITS = ("train", "test")
MAX_DIGITS = 5


@dataclass(frozen=True)
class Thing:
    """One digit or shape. ``x``, ``y`` is the top-left pixel of its 16 x 16 box."""

    name: str
    color: str
    row: int
    col: int
    x: int
    y: int

    @property
    def is_digit(self) -> bool:
        return self.name in DIGITS


@dataclass(frozen=True)
class Question:
    """One question with its single-word answer; words are separated by blanks."""

    task: str
    text: str
    answer: str


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
    """How a scene is laid out: counts, free cells between, how far things leave their cell.

    ``asks`` demands a layout on which every task can be asked.
    """

    digits: tuple[int, int] = (1, MAX_DIGITS)
    shapes: tuple[int, int] = (1, 3)
    gap: int = 1
    jitter: int = 4
    asks: bool = True


STANDARD = Level()
# Many targets per image teach a tower to read far sooner than a few; not used for questions.
DENSE = Level(digits=(24, 32), shapes=(8, 12), gap=0, jitter=2, asks=False)


def make_scene(seed: int, split: str = "test", level: Level = STANDARD) -> Scene:
    """Returns the scene number ``seed`` of ``split``.

    Raises:
        ValueError: ``split`` is neither ``train`` nor ``test``, or ``seed`` is negative.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is not known; choose one of {SPLITS}.")
    if seed < 0:
        raise ValueError(f"seed={seed} must not be negative.")
    rng = np.random.default_rng([SPLITS.index(split), seed])
    things, questions = _layout(rng, level)
    pixels = _background(rng)
    for thing in things:
        _paint(pixels, thing, rng, split)
    noise = rng.normal(0, 6, pixels.shape)
    pixels = np.clip(pixels + noise, 0, 255).astype(np.uint8)
    return Scene(pixels, things, questions)


def pick_question(scene: Scene, seed: int) -> Question:
    """Returns one question: the tasks take turns with ``seed``, the question within is drawn."""
    rng = np.random.default_rng([len(SPLITS), seed])
    task = TASKS[seed % len(TASKS)]
    fitting = [q for q in scene.questions if q.task == task]
    if task == "presence":  # as many "yes" as "no", however many digits there are
        wanted = "yes" if rng.random() < 0.5 else "no"
        fitting = [q for q in fitting if q.answer == wanted]
    return fitting[int(rng.integers(len(fitting)))]


def _layout(
    rng: np.random.Generator, level: Level
) -> tuple[tuple[Thing, ...], tuple[Question, ...]]:
    """Draws things until they allow every task; the counts are drawn once, so they stay even."""
    n_digits = int(rng.integers(level.digits[0], level.digits[1] + 1))
    n_shapes = int(rng.integers(level.shapes[0], level.shapes[1] + 1))
    while True:
        things = _place(rng, n_digits, n_shapes, level)
        questions = _questions(rng, things)
        if not level.asks or {q.task for q in questions} == set(TASKS):
            return things, tuple(questions)


def _place(
    rng: np.random.Generator, n_digits: int, n_shapes: int, level: Level
) -> tuple[Thing, ...]:
    names = [*rng.choice(DIGITS, n_digits), *rng.choice(SHAPES, n_shapes)]
    cells = _cells(rng, len(names), level.gap)
    order = rng.permutation(len(names))
    colors = rng.choice(list(COLORS), len(names))
    shifts = rng.integers(-level.jitter, level.jitter + 1, (len(names), 2))
    things = []
    for (row, col), i, color, (dy, dx) in zip(cells, order, colors, shifts, strict=True):
        x = int(np.clip(col * CELL + dx, 0, SIZE - CELL))
        y = int(np.clip(row * CELL + dy, 0, SIZE - CELL))
        things.append(Thing(str(names[i]), str(color), row, col, x, y))
    return tuple(things)


def _cells(rng: np.random.Generator, n: int, gap: int) -> list[tuple[int, int]]:
    """Draws ``n`` cells with at least ``gap`` free cells between any two."""
    while True:
        chosen: list[tuple[int, int]] = []
        for index in rng.permutation(N_CELLS * N_CELLS):
            row, col = divmod(int(index), N_CELLS)
            if all(max(abs(row - r), abs(col - c)) > gap for r, c in chosen):
                chosen.append((row, col))
            if len(chosen) == n:
                return chosen


def _background(rng: np.random.Generator) -> NDArray[np.float64]:
    base = rng.uniform(15, 105, (5, 5, 1)) + rng.uniform(-18, 18, (5, 5, 3))
    field = Image.fromarray(np.clip(base, 0, 255).astype(np.uint8))
    field = field.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(field)
    for _ in range(int(rng.integers(6, 14))):
        ends = [int(v) for v in rng.integers(0, SIZE, 4)]
        gray = int(rng.integers(40, 130))
        tint = tuple(int(v) for v in np.clip(gray + rng.integers(-15, 16, 3), 0, 255))
        draw.line(ends, fill=tint, width=1)
    return np.asarray(field, dtype=np.float64).copy()


def _paint(pixels: NDArray[np.float64], thing: Thing, rng: np.random.Generator, split: str) -> None:
    masks = _digit_masks(split)[thing.name] if thing.is_digit else (_shape_mask(thing.name),)
    mask = masks[int(rng.integers(len(masks)))]
    turned = mask.rotate(float(rng.uniform(-10, 10)), Image.Resampling.BILINEAR)
    alpha = np.asarray(turned, dtype=np.float64)[:, :, None] / 255
    color = np.asarray(COLORS[thing.color]) + rng.integers(-12, 13, 3)
    window = pixels[thing.y : thing.y + CELL, thing.x : thing.x + CELL]
    window += alpha * (color - window)


@lru_cache
def _digit_masks(split: str) -> dict[str, tuple[Image.Image, ...]]:
    """Handwritten digits as 16 x 16 gray images; every third scan is kept for testing."""
    from vtprune.eval._extras import need

    datasets = need("sklearn.datasets", extra="eval")
    scans = datasets.load_digits()
    held_out = np.arange(len(scans.target)) % 3 == 0
    chosen = np.flatnonzero(held_out if split == "test" else ~held_out)
    masks: dict[str, list[Image.Image]] = {name: [] for name in DIGITS}
    for i in chosen:
        scan = Image.fromarray(np.clip(scans.images[i] * 17, 0, 255).astype(np.uint8))
        scan = scan.resize((CELL, CELL), Image.Resampling.BICUBIC)
        masks[str(scans.target[i])].append(scan)
    return {name: tuple(images) for name, images in masks.items()}


@lru_cache
def _shape_mask(name: str) -> Image.Image:
    big = 8 * CELL
    mask = Image.new("L", (big, big))
    draw = ImageDraw.Draw(mask)
    low, mid, high = big // 8, big // 2, big - big // 8
    if name == "circle":
        draw.ellipse((low, low, high, high), fill=255)
    elif name == "square":
        draw.rectangle((low + 4, low + 4, high - 4, high - 4), fill=255)
    elif name == "triangle":
        draw.polygon([(mid, low), (low, high), (high, high)], fill=255)
    else:
        draw.rectangle((mid - 18, low, mid + 18, high), fill=255)
        draw.rectangle((low, mid - 18, high, mid + 18), fill=255)
    return mask.resize((CELL, CELL), Image.Resampling.BOX)


def _questions(rng: np.random.Generator, things: Sequence[Thing]) -> list[Question]:
    digits = [t for t in things if t.is_digit]
    asked = []
    for t in digits:
        if sum(d.color == t.color for d in digits) == 1:
            asked.append(Question("read", f"which digit is {t.color} ?", t.name))
        if sum(d.name == t.name for d in digits) == 1:
            asked.append(Question("color", f"what color is the {t.name} ?", t.color))
    present = {d.name for d in digits}
    for name in DIGITS:
        answer = "yes" if name in present else "no"
        asked.append(Question("presence", f"is there a {name} ?", answer))
    if len(digits) <= MAX_DIGITS:
        asked.append(Question("count", "how many digits ?", str(len(digits))))
    for t in things:
        near = [o for o in things if o.col < t.col and abs(o.row - t.row) <= 1]
        unique = sum(o.color == t.color for o in things) == 1
        if unique and len(near) == 1 and near[0].row == t.row:
            asked.append(Question("left", f"which is left of the {t.color} one ?", near[0].name))
    return [asked[i] for i in rng.permutation(len(asked))]


def vocabulary() -> list[str]:
    """Every word that a question or an answer can hold, in a fixed order."""
    return [*WORDS, *COLORS, *DIGITS, *SHAPES]
