"""Clips of moving digits and shapes, with questions about time, order and single things.

A clip is 16 frames of 64 x 64 pixels at two frames a second: three or four things on a cluttered
background that stands still. Things move or not, one comes after the others, one may leave early,
one may change its color. Most pixels repeat themselves from frame to frame, and what a question
asks for is often there only for a while, so dropping the wrong visual tokens costs the answer.

Everything is a function of ``(split, seed)``. A moment is two frames: what a visual token of
Qwen2.5-VL covers in time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vtprune.errors import ConfigError
from vtprune.eval.clip_questions import KINDS, Track, all_questions
from vtprune.eval.scene_pixels import background, put, stamp
from vtprune.eval.scene_questions import Question
from vtprune.eval.scene_things import CELL, COLORS, NAMES, Thing
from vtprune.eval.scenes import SPLITS

SIDE = 64  # pixels
FRAMES, FPS = 16, 2.0
MOMENT = 2  # frames
MOMENTS = FRAMES // MOMENT
STREAM = 29  # of random numbers, apart from those of scenes and pictures
# Steps in (x, y) of what moves that way.
WAYS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1), "nowhere": (0, 0)}
LEAST_LIFE = 4  # moments
PATHS = (24, 44)  # pixels that a thing covers while it is there
NEAR = 15  # pixels between the corners of two things: at least
LINES, NOISE = (2, 5), 4.0


@dataclass(frozen=True)
class Clip:
    """``frames`` is ``[16, 64, 64, 3]`` uint8; ``questions`` are all that the clip allows."""

    frames: NDArray[np.uint8]
    tracks: tuple[Track, ...]
    questions: tuple[Question, ...]


def make_clip(seed: int, split: str = "test") -> Clip:
    """Returns the clip number ``seed`` of ``split``.

    Raises:
        ConfigError: ``split`` is neither ``train`` nor ``test``, or ``seed`` is negative.
    """
    if split not in SPLITS:
        raise ConfigError(f"split={split!r} is not known; choose one of {SPLITS}.")
    if seed < 0:
        raise ConfigError(f"seed={seed} must not be negative.")
    rng = np.random.default_rng([STREAM, SPLITS.index(split), seed])
    while True:
        tracks = _tracks(rng)
        if _apart(tracks):
            break
    asked = all_questions(tracks)
    questions = tuple(asked[i] for i in rng.permutation(len(asked)))
    return Clip(_render(tracks, rng, split), tracks, questions)


def pick_question(clip: Clip, seed: int, kind: str | None = None) -> Question:
    """Returns one question of ``kind``; without it the kinds take turns with ``seed``.

    So do "yes" and "no" of presence.
    """
    rng = np.random.default_rng([STREAM, len(SPLITS), seed])
    turn = seed
    if kind is None:
        kind, turn = KINDS[seed % len(KINDS)], seed // len(KINDS)
    fitting = [q for q in clip.questions if q.kind == kind]
    if kind == "presence":
        wanted = "yes" if turn % 2 == 0 else "no"
        fitting = [q for q in fitting if q.answer == wanted]
    return fitting[int(rng.integers(len(fitting)))]


def _tracks(rng: np.random.Generator) -> tuple[Track, ...]:
    """Draws things, when they are there and where; they may still meet."""
    number = int(rng.integers(3, 5))
    # A digit and a shape at least, so that both can be asked for.
    some = [str(rng.choice(NAMES[:10])), str(rng.choice(NAMES[10:]))]
    others = [name for name in NAMES if name not in some]
    names = [*some, *(str(n) for n in rng.choice(others, number - 2, replace=False))]
    names = [names[i] for i in rng.permutation(number)]
    colors = [str(color) for color in rng.choice(list(COLORS), number + 1, replace=False)]
    last = int(rng.integers(2, MOMENTS - LEAST_LIFE + 1))
    firsts = [0, 0, last] if number == 3 else [0, 0, int(rng.integers(0, last)), last]
    leaves, turns = int(rng.integers(number)), int(rng.integers(2))
    made = []
    for i, (name, first) in enumerate(zip(names, firsts, strict=True)):
        end = int(rng.integers(first + LEAST_LIFE, MOMENTS + 1)) if i == leaves else MOMENTS
        turn = int(rng.integers(first + 2, end - 1)) if i == turns else end
        way, places = _path(rng, first, end)
        pair = colors[i], colors[-1] if i == turns else colors[i]
        made.append(Track(name, pair, first, turn, end, way, places))
    return tuple(made)


def _path(
    rng: np.random.Generator, first: int, end: int
) -> tuple[str, tuple[tuple[float, float], ...]]:
    """Returns which way a thing goes, and its top-left corner (x, y) in each frame it is in."""
    way = str(rng.choice(list(WAYS)))
    n, room = (end - first) * MOMENT, SIDE - CELL
    covered = rng.uniform(*PATHS)
    ends = np.outer([0, covered], WAYS[way])
    low, high = ends.min(0), ends.max(0)
    start = rng.uniform(-low, room - high)
    steps = np.linspace(0, 1, n)[:, None] * ends[1] + start
    return way, tuple((float(x), float(y)) for x, y in steps)


def _apart(tracks: tuple[Track, ...]) -> bool:
    for i, one in enumerate(tracks):
        for other in tracks[:i]:
            for frame in range(FRAMES):
                a, b = one.place(frame), other.place(frame)
                if a and b and max(abs(a[0] - b[0]), abs(a[1] - b[1])) < NEAR:
                    return False
    return True


def _render(tracks: tuple[Track, ...], rng: np.random.Generator, split: str) -> NDArray[np.uint8]:
    still = background(rng, LINES, SIDE)
    # A thing looks the same while it moves; only its color may change.
    looks = [
        [stamp(Thing(t.name, color, 0, 0, 0, 0), rng, split) for color in t.colors] for t in tracks
    ]
    frames = []
    for frame in range(FRAMES):
        pixels = still.copy()
        for track, ((mask, before), (_, after)) in zip(tracks, looks, strict=True):
            place = track.place(frame)
            if place is not None:
                color = after if frame // MOMENT >= track.turn else before
                put(pixels, (round(place[0]), round(place[1])), mask, color)
        frames.append(pixels + rng.normal(0, NOISE, pixels.shape))
    return np.clip(np.stack(frames), 0, 255).astype(np.uint8)
