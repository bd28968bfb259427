"""Training batches from scenes: pixels, targets per patch and per image, packed questions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import LlavaProcessor

from vtprune.eval import scenes
from vtprune.eval.mini_llava import GRID, PATCH

IGNORE = -100
N_BLOCKS, BLOCK = 16, 12  # questions per image; words per question block at most
COLOR_NAMES = tuple(scenes.COLORS)


@dataclass
class Batch:
    """One batch of scenes.

    ``pixels`` ``[B, 3, 128, 128]``; ``thing``, ``color`` ``[B, N]``; ``present`` ``[B, C]``;
    ``count`` ``[B]``; ``ids``, ``labels`` ``[B, N_BLOCKS * BLOCK]``.
    """

    pixels: Tensor
    thing: Tensor
    color: Tensor
    present: Tensor
    count: Tensor
    ids: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(**{name: value.to(device) for name, value in vars(self).items()})


def patch_targets(things: tuple[scenes.Thing, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Per patch ``[GRID, GRID]``: 1 + index of the thing's name (0 = background), and its color.

    A patch belongs to the thing that covers most of it; patches covered by less than a quarter
    are ignored.
    """
    edges = np.arange(GRID) * PATCH
    best = np.zeros((GRID, GRID))
    name = np.zeros((GRID, GRID), dtype=np.int64)
    color = np.full((GRID, GRID), IGNORE, dtype=np.int64)
    for t in things:
        wide = np.minimum(edges + PATCH, t.x + scenes.CELL) - np.maximum(edges, t.x)
        high = np.minimum(edges + PATCH, t.y + scenes.CELL) - np.maximum(edges, t.y)
        cover = high.clip(0)[:, None] * wide.clip(0)[None] / PATCH**2
        mine = cover > best
        clear = mine & (cover >= 0.25)
        name[mine], color[mine] = IGNORE, IGNORE
        name[clear] = 1 + scenes.NAMES.index(t.name)
        color[clear] = COLOR_NAMES.index(t.color)
        best = np.maximum(best, cover)
    return name, color


def image_targets(things: tuple[scenes.Thing, ...]) -> tuple[np.ndarray, int]:
    """Presence of every name and color, and the number of digits (ignored beyond the maximum)."""
    seen = {t.name for t in things} | {t.color for t in things}
    present = np.array([n in seen for n in (*scenes.NAMES, *COLOR_NAMES)], dtype=np.float32)
    count = sum(t.is_digit for t in things)
    return present, count if count <= scenes.MAX_DIGITS else IGNORE


class Writer:
    """Turns scenes into batches."""

    def __init__(self, processor: LlavaProcessor, level: scenes.Level, batch: int) -> None:
        self.tokenizer = processor.tokenizer
        self.level = level
        self.batch = batch

    def question_block(self, question: scenes.Question) -> tuple[list[int], list[int]]:
        words = [*question.text.split(), "assistant", ":", question.answer, "</s>"]
        ids = self.tokenizer.convert_tokens_to_ids(words)
        labels = [IGNORE] * (len(ids) - 3) + ids[-2:] + [IGNORE]  # shifted by one already
        pad = BLOCK - len(ids)
        return ids + [0] * pad, labels + [IGNORE] * pad

    def questions(self, scene: scenes.Scene) -> tuple[list[int], list[int]]:
        chosen = [q for q in scene.questions if q.task != "presence"]
        for answer in ("yes", "no"):  # as many of each as far as the scene allows
            asked = [q for q in scene.questions if q.task == "presence" and q.answer == answer]
            chosen += asked[:3]
        rare = [q for q in chosen if q.task in ("left", "count")]
        common = [q for q in chosen if q.task not in ("left", "count")]
        ids, labels = [], []
        for question in [*rare, *common][:N_BLOCKS]:
            block = self.question_block(question)
            ids, labels = ids + block[0], labels + block[1]
        pad = N_BLOCKS * BLOCK - len(ids)
        return ids + [0] * pad, labels + [IGNORE] * pad

    def __call__(self, step: int, offset: int) -> Batch:
        first = offset + step * self.batch
        made = [scenes.make_scene(first + i, "train", self.level) for i in range(self.batch)]
        pixels = torch.from_numpy(np.stack([s.pixels for s in made])).permute(0, 3, 1, 2)
        targets = [patch_targets(s.things) for s in made]
        image = [image_targets(s.things) for s in made]
        text = [self.questions(s) for s in made]
        return Batch(
            pixels.float() / 127.5 - 1,
            torch.from_numpy(np.stack([t[0] for t in targets])).flatten(1),
            torch.from_numpy(np.stack([t[1] for t in targets])).flatten(1),
            torch.from_numpy(np.stack([p for p, _ in image])),
            torch.tensor([c for _, c in image]),
            torch.tensor([t[0] for t in text]),
            torch.tensor([t[1] for t in text]),
        )
