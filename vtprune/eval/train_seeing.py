"""What a tower is taught in training: readouts per visual token and per image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtprune.eval.mini_llava import WIDTH
from vtprune.eval.scene_things import DIGITS, NAMES, SIDES
from vtprune.eval.train_data import COLOR_NAMES, IGNORE, LONGEST, MOST, Batch


class TokenHeads(nn.Module):
    """Readouts per visual token, used in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.thing = nn.Linear(WIDTH, 1 + len(NAMES))
        self.color = nn.Linear(WIDTH, len(COLOR_NAMES))
        self.place = nn.Linear(WIDTH, 1 + LONGEST)
        self.sides = nn.Linear(WIDTH, len(SIDES) * (1 + len(NAMES)))


class ImageHeads(nn.Module):
    """Readouts per image, used in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.present = nn.Linear(WIDTH, len(NAMES) + len(COLOR_NAMES))
        self.counts = nn.Linear(WIDTH, 2 * (1 + MOST))


def token_losses(heads: TokenHeads, tokens: Tensor, batch: Batch) -> dict[str, Tensor]:
    """Losses and accuracies of the readouts on ``tokens`` ``[B, N, D]``."""
    tokens = heads.norm(tokens)
    thing = heads.thing(tokens).float()
    weight = rarer_nothing(thing)
    digit = (batch.thing > 0) & (batch.thing <= len(DIGITS))
    return {
        "thing": F.cross_entropy(thing.mT, batch.thing, weight=weight, ignore_index=IGNORE),
        "digit_acc": (thing.argmax(-1) == batch.thing)[digit].float().mean(),
        **_thing_losses(heads, tokens[batch.color >= 0], batch),
    }


def _thing_losses(heads: TokenHeads, tokens: Tensor, batch: Batch) -> dict[str, Tensor]:
    """Losses of what only tokens ``[M, D]`` of things have: color, place and what is beside."""
    mine = batch.color >= 0
    color, place = heads.color(tokens).float(), heads.place(tokens).float()
    sides = heads.sides(tokens).float().unflatten(-1, (len(SIDES), -1))
    beside = batch.sides.mT[mine]  # [M, 4]
    some = beside > 0
    return {
        "color": F.cross_entropy(color, batch.color[mine]),
        "place": F.cross_entropy(place, batch.place[mine], ignore_index=IGNORE),
        "beside": F.cross_entropy(sides.mT, beside, weight=rarer_nothing(sides)),
        "color_acc": (color.argmax(-1) == batch.color[mine]).float().mean(),
        "place_acc": (place.argmax(-1) == batch.place[mine]).float().mean(),
        "beside_acc": (sides.argmax(-1) == beside)[some].float().mean(),
    }


def image_losses(heads: ImageHeads, image: Tensor, batch: Batch) -> dict[str, Tensor]:
    """Losses of the readouts on one state ``[B, D]`` per image."""
    image = heads.norm(image)
    counts = heads.counts(image).float().unflatten(-1, (2, -1))
    present = heads.present(image).float()
    losses = {"present": F.binary_cross_entropy_with_logits(present, batch.present)}
    if (batch.counts != IGNORE).any():
        losses["counts"] = 0.3 * F.cross_entropy(counts.mT, batch.counts, ignore_index=IGNORE)
    return losses


def rarer_nothing(logits: Tensor) -> Tensor:
    """Class weights: 0, nothing there, is by far the most frequent."""
    weight = torch.ones(logits.shape[-1], device=logits.device)
    weight[0] = 0.3
    return weight
