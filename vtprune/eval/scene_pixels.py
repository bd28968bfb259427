"""The pixels of a scene: clutter, and things painted over it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from vtprune.eval._extras import need
from vtprune.eval.scene_things import CELL, COLORS, DIGITS, SIZE, Thing


def render(
    things: Sequence[Thing],
    rng: np.random.Generator,
    split: str,
    lines: tuple[int, int],
    noise: float,
    size: int = SIZE,
) -> NDArray[np.uint8]:
    """Returns ``[size, size, 3]``: ``lines`` strokes behind (least, most), ``noise`` in grays."""
    pixels = background(rng, lines, size)
    for thing in things:
        put(pixels, (thing.x, thing.y), *stamp(thing, rng, split))
    return np.clip(pixels + rng.normal(0, noise, pixels.shape), 0, 255).astype(np.uint8)


def background(rng: np.random.Generator, lines: tuple[int, int], size: int) -> NDArray[np.float64]:
    """Returns ``[size, size, 3]``: gray clouds, and strokes over them (least, most)."""
    base = rng.uniform(15, 105, (5, 5, 1)) + rng.uniform(-18, 18, (5, 5, 3))
    field = Image.fromarray(np.clip(base, 0, 255).astype(np.uint8))
    field = field.resize((size, size), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(field)
    for _ in range(int(rng.integers(lines[0], lines[1] + 1))):
        ends = [int(v) for v in rng.integers(0, size, 4)]
        gray = int(rng.integers(40, 130))
        tint = tuple(int(v) for v in np.clip(gray + rng.integers(-15, 16, 3), 0, 255))
        draw.line(ends, fill=tint, width=1)
    return np.asarray(field, dtype=np.float64).copy()


def stamp(
    thing: Thing, rng: np.random.Generator, split: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Returns a thing's mask ``[size, size, 1]`` from 0 to 1, and its color ``[3]``."""
    kernel = Image.Resampling.BICUBIC if thing.is_digit else Image.Resampling.BOX
    drawn = _digit_masks(split)[thing.name] if thing.is_digit else (_shape_mask(thing.name),)
    mask = drawn[int(rng.integers(len(drawn)))].resize((thing.size, thing.size), kernel)
    turned = mask.rotate(float(rng.uniform(-10, 10)), Image.Resampling.BILINEAR)
    alpha = np.asarray(turned, dtype=np.float64)[:, :, None] / 255
    return alpha, np.asarray(COLORS[thing.color], dtype=np.float64) + rng.integers(-12, 13, 3)


def put(
    pixels: NDArray[np.float64],
    place: tuple[int, int],
    alpha: NDArray[np.float64],
    color: NDArray[np.float64],
) -> None:
    """Paints a mask in a color over ``pixels``, its top-left corner at ``place`` (x, y)."""
    x, y = place
    window = pixels[y : y + len(alpha), x : x + alpha.shape[1]]
    window += alpha * (color - window)


@lru_cache
def _digit_masks(split: str) -> dict[str, tuple[Image.Image, ...]]:
    """Handwritten digits as 8 x 8 gray images; every third scan is kept for testing."""
    scans = need("sklearn.datasets", extra="eval").load_digits()
    held_out = np.arange(len(scans.target)) % 3 == 0
    masks: dict[str, list[Image.Image]] = {name: [] for name in DIGITS}
    for i in np.flatnonzero(held_out if split == "test" else ~held_out):
        scan = Image.fromarray(np.clip(scans.images[i] * 17, 0, 255).astype(np.uint8))
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
    return mask
