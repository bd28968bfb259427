"""Training batches from clips: frames, targets per visual token, packed questions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vtprune.eval.clip_questions import KINDS, Track
from vtprune.eval.clips import MOMENT, MOMENTS, SIDE, WAYS, Clip, make_clip
from vtprune.eval.scene_questions import Question
from vtprune.eval.scene_things import CELL, COLORS, NAMES, Thing
from vtprune.eval.train_data import BLOCK, COLOR_NAMES, IGNORE, N_BLOCKS, TOKEN, block, owners

PER_MOMENT = (SIDE // TOKEN) ** 2  # visual tokens
AGES = 4  # moments since a thing came that are told apart; one more if it was always there
BACK = 3  # moments: what was there so long ago tells which way things went
SHARES = {"motion": 4, "change": 2, "order": 1, "read": 2, "shape": 1, "color": 2, "presence": 4}


@dataclass
class ClipBatch:
    """One batch of clips, int64 but for the pixels and ``looks``.

    ``pixels`` ``[B, 3, F, H, W]``; per visual token ``[B, N]``: ``thing`` (0 = background),
    ``color``, ``way`` in which it was seen to move, ``age`` in moments, ``turned`` whether it has
    changed its color, ``was`` the thing that was there ``BACK`` moments ago; ``looks``
    ``[B, N_BLOCKS, N]`` bool: where the answer is to be seen; the rest as in ``train_data.Batch``.
    """

    pixels: Tensor
    thing: Tensor
    color: Tensor
    way: Tensor
    age: Tensor
    turned: Tensor
    was: Tensor
    looks: Tensor
    ids: Tensor
    labels: Tensor
    early: Tensor
    kinds: Tensor

    def to(self, device: torch.device) -> ClipBatch:
        return ClipBatch(**{name: value.to(device) for name, value in vars(self).items()})


class ClipWriter:
    """Turns clips into batches of so many."""

    def __init__(self, tokenizer: Any, batch: int) -> None:
        self.tokenizer, self.batch = tokenizer, batch

    def __call__(self, first: int, size: tuple[int, int]) -> ClipBatch:
        """The training clips from number ``first`` on; they have one size."""
        clips = [make_clip(i, "train") for i in range(first, first + self.batch)]
        frames = torch.from_numpy(np.stack([clip.frames for clip in clips]))
        owner = np.stack([track_of(clip.tracks) for clip in clips])
        tokens = torch.from_numpy(
            np.stack([targets(clip.tracks, own) for clip, own in zip(clips, owner, strict=True)])
        )
        asked = [self._questions(clip, own) for clip, own in zip(clips, owner, strict=True)]
        blocks = torch.tensor([rows for rows, _, _ in asked]).flatten(2)
        shown = ("thing", "color", "way", "age", "turned", "was")
        named = dict(zip(shown, tokens.unbind(1), strict=True))
        named |= dict(zip(("ids", "labels", "early"), blocks.unbind(1), strict=True))
        return ClipBatch(
            pixels=frames.permute(0, 4, 1, 2, 3).float() / 127.5 - 1,
            looks=torch.from_numpy(np.stack([looks for _, looks, _ in asked])),
            kinds=torch.tensor([kinds for _, _, kinds in asked]),
            **named,
        )

    def _questions(
        self, clip: Clip, owner: NDArray[np.int64]
    ) -> tuple[list[list[list[int]]], NDArray[np.bool_], list[int]]:
        """Ids, labels, early labels ``[3, N_BLOCKS, BLOCK]``; where to look; kinds."""
        chosen = choose(clip.questions)
        lacking = N_BLOCKS - len(chosen)
        blocks = [self._block(question) for question in chosen]
        blocks += [[[0] * BLOCK, [IGNORE] * BLOCK, [IGNORE] * BLOCK]] * lacking
        seen = np.zeros((N_BLOCKS, owner.size), dtype=bool)
        for i, question in enumerate(chosen):
            seen[i] = looks(question, clip.tracks, owner)
        kinds = [KINDS.index(question.kind) for question in chosen] + [IGNORE] * lacking
        return [list(rows) for rows in zip(*blocks, strict=True)], seen, kinds

    def _block(self, question: Question) -> list[list[int]]:
        """Ids, labels and early labels of one question."""
        words = question.text.split()
        known = [i for i, word in enumerate(words) if word in NAMES or word in COLORS]
        telling = known[0] if known else len(words) - 1
        return block(self.tokenizer, question, telling)


def track_of(tracks: Sequence[Track]) -> NDArray[np.int64]:
    """Returns per visual token ``[N]`` which thing covers it, -1 = none, IGNORE = an edge."""
    found = []
    for moment in range(MOMENTS):
        there = [
            (i, t.place(moment * MOMENT), t.place(moment * MOMENT + 1))
            for i, t in enumerate(tracks)
        ]
        some = [(i, a, b) for i, a, b in there if a and b]
        things = [_thing(tracks[i], (a[0] + b[0]) / 2, (a[1] + b[1]) / 2) for i, a, b in some]
        owner = owners(things, (SIDE, SIDE), SIDE)
        index = np.array([*(i for i, _, _ in some), -1])
        found.append(np.where(owner == IGNORE, IGNORE, index[np.clip(owner, -1, None)]))
    return np.concatenate(found)


def _thing(track: Track, x: float, y: float) -> Thing:
    return Thing(track.name, track.colors[0], 0, 0, round(x), round(y), CELL)


def targets(tracks: Sequence[Track], owner: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns thing, color, way, age, turned and was of each visual token, ``[6, N]``."""
    made = np.full((6, owner.size), IGNORE)
    made[0, owner == -1] = 0
    for moment, number, mine in _spans(owner, len(tracks)):
        track = tracks[number]
        turned = moment >= track.turn
        age = min(moment - track.first, AGES - 1) if track.first else AGES
        way = list(WAYS).index(track.way) if moment >= track.first + 2 else IGNORE
        color = COLOR_NAMES.index(track.colors[int(turned)])
        row = [1 + NAMES.index(track.name), color, way, age, int(turned and track.changes)]
        made[:5, mine] = np.array(row)[:, None]
    made[5, BACK * PER_MOMENT :] = made[0, : -BACK * PER_MOMENT]
    return made


def looks(
    question: Question, tracks: Sequence[Track], owner: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Returns in which visual tokens ``[N]`` the answer is to be seen; in none if by absence."""
    words = question.text.split()
    seen = np.zeros(owner.size, dtype=bool)
    latest = max(track.first for track in tracks)
    for moment, number, mine in _spans(owner, len(tracks)):
        track = tracks[number]
        color = track.colors[int(moment >= track.turn)]
        meant = track.first == latest if "last" in words else bool({track.name, color} & {*words})
        when = moment >= track.first + 2 if question.kind == "motion" else True
        when = when and ("become" not in words or moment >= track.turn)
        when = when and ("was" not in words or moment < track.turn)
        seen[mine] |= meant and when
    return seen


def _spans(owner: NDArray[np.int64], n: int) -> Iterator[tuple[int, int, NDArray[np.int64]]]:
    """Yields the moments, the things there and the indices of their visual tokens."""
    for moment in range(MOMENTS):
        part = owner[moment * PER_MOMENT : (moment + 1) * PER_MOMENT]
        for number in range(n):
            mine = np.flatnonzero(part == number) + moment * PER_MOMENT
            if len(mine):
                yield moment, number, mine


def choose(questions: Sequence[Question]) -> list[Question]:
    """Returns up to ``N_BLOCKS`` questions, of each kind its share; as many "yes" as "no"."""
    chosen = []
    left = dict(SHARES)
    said = {"yes": 2, "no": 2}
    for question in questions:
        kind, answer = question.kind, question.answer
        if left[kind] and (kind != "presence" or said[answer]):
            chosen.append(question)
            left[kind] -= 1
            if kind == "presence":
                said[answer] -= 1
    return chosen[:N_BLOCKS]
