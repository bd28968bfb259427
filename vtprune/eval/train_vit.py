"""Trains the shipped ViT classifier on generated pictures.

    python -m vtprune.eval.train_vit --out runs/mini-vit

It starts as mini-llava's vision tower, which has the same blocks and reads digits of 16 pixels;
from scratch it names after 500 steps what so it names after 75. Stages, each resumed from its last
checkpoint when the command is given again:

1. ``crowded``: pictures full of things. The CLS gives the classes that are present equal shares;
   readouts per visual token, used in training only, say what is here and in which color.
2. ``single``: the same on pictures of one thing, as they are classified. At the first rate it
   would forget: one thing per picture teaches little.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from vtprune.eval import mini_llava, mini_vit, shipped
from vtprune.eval.scene_objects import CLASSES, SIDE, class_of, make_picture
from vtprune.eval.scene_things import COLORS, NAMES, Thing
from vtprune.eval.train_data import IGNORE, owners
from vtprune.eval.train_loop import Show, Stage, Trainer, run_command
from vtprune.eval.train_seeing import rarer_nothing

STAGES = (
    Stage("crowded", 1600, 1e-3, ("tower",)),
    Stage("single", 600, 2e-4, ("tower",)),
)
CROWDS = {"crowded": 40, "single": 1}  # see ``make_picture``


@dataclass
class Shown:
    """One batch: ``pixels`` ``[B, 3, 112, 112]``, ``share`` ``[B, 112]`` of each class.

    Per visual token ``[B, N]``: ``thing`` (0 = background) and ``color``.
    """

    pixels: Tensor
    share: Tensor
    thing: Tensor
    color: Tensor

    def to(self, device: torch.device) -> Shown:
        return Shown(**{name: value.to(device) for name, value in vars(self).items()})


class Targets(Protocol):
    """What readouts per visual token are to say, ``[B, N]`` as in ``Shown``."""

    thing: Tensor
    color: Tensor


class Heads(nn.Module):
    """Readouts per visual token, used in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.thing = nn.Linear(mini_vit.WIDTH, 1 + len(NAMES))
        self.color = nn.Linear(mini_vit.WIDTH, len(COLORS))


class VitTrainer(Trainer):
    """Trains ``mini-vit``, with mini-llava's tower as its start."""

    heads: Heads

    def __init__(self, out: Path, device: torch.device) -> None:
        teacher = cast(Any, shipped.load("mini-llava")[0])
        model = mini_vit.build_model()
        inherit(model, teacher.model.vision_tower)
        for block in model.blocks:
            block.attn.fused_attn = False  # whose backward takes twice as long on a CPU
        self.stages = STAGES
        super().__init__(model.to(device), None, Heads().to(device), out)

    def show(self, stage: Stage, n: int) -> Show:
        return lambda first, size: shown(first, n, CROWDS[stage.name])

    def losses(self, stage: Stage, batch: Shown) -> dict[str, Tensor]:
        with torch.autocast(self.device.type, torch.bfloat16):
            states = self.model.forward_features(batch.pixels)  # [B, 1 + N, D]
            logits = self.model.forward_head(states).float()
            values = token_losses(self.heads, states[:, 1:], batch)
        seen = batch.share.gather(1, logits.argmax(-1, keepdim=True)) > 0
        return {
            "class": F.cross_entropy(logits, batch.share),
            "class_acc": seen.float().mean(),
            **values,
        }

    def save(self, folder: Path) -> None:
        mini_vit.save(self.model, folder)


@torch.no_grad()
def inherit(model: Any, tower: Any) -> None:
    """Starts all but the classifier as ``tower``, whose positions beyond the grid are left out."""
    given = tower.embeddings
    table = given.position_embedding.weight
    patches = table[1:].unflatten(0, (mini_llava.GRID, -1))[: mini_vit.GRID, : mini_vit.GRID]
    model.pos_embed.copy_(torch.cat([table[:1], patches.flatten(0, 1)]))
    model.cls_token.copy_(given.class_embedding)
    model.patch_embed.proj.weight.copy_(given.patch_embedding.weight)
    copied = [(model.norm_pre, tower.pre_layrnorm), (model.norm, tower.post_layernorm)]
    for block, layer in zip(model.blocks, tower.encoder.layers, strict=True):
        copied += [(block.norm1, layer.layer_norm1), (block.norm2, layer.layer_norm2)]
        copied += [(block.mlp, layer.mlp), (block.attn.proj, layer.self_attn.out_proj)]
        three = [getattr(layer.self_attn, f"{name}_proj") for name in "qkv"]
        block.attn.qkv.weight.copy_(torch.cat([part.weight for part in three]))
        block.attn.qkv.bias.copy_(torch.cat([part.bias for part in three]))
    for ours, theirs in copied:
        ours.load_state_dict(theirs.state_dict())


def shown(first: int, n: int, crowd: int = 1) -> Shown:
    """The ``n`` training pictures from number ``first`` on."""
    pictures = [make_picture(i, "train", crowd) for i in range(first, first + n)]
    share = torch.zeros(n, len(CLASSES))
    for row, picture in zip(share, pictures, strict=True):
        row[[class_of(thing) for thing in picture.things]] = 1
    tokens = torch.from_numpy(np.stack([token_targets(p.things) for p in pictures]))
    share /= share.sum(1, keepdim=True)
    return Shown(mini_vit.preprocess(pictures), share, tokens[:, 0], tokens[:, 1])


def token_targets(things: tuple[Thing, ...]) -> NDArray[np.int64]:
    """Per visual token ``[2, N]``: 1 + name, 0 in the background, and color; IGNORE at edges."""
    rows = [(1 + NAMES.index(t.name), list(COLORS).index(t.color)) for t in things]
    table = np.array([*rows, (0, IGNORE), (IGNORE, IGNORE)])
    owner = owners(things, (SIDE, SIDE), SIDE)
    return table[np.where(owner == IGNORE, len(things) + 1, owner % (len(things) + 1))].T


def token_losses(heads: Heads, tokens: Tensor, batch: Targets) -> dict[str, Tensor]:
    """Losses and accuracies of the readouts on ``tokens`` ``[B, N, D]``."""
    thing, color = heads.thing(tokens).float(), heads.color(tokens).float()
    weight, some = rarer_nothing(thing), batch.thing > 0
    return {
        "thing": F.cross_entropy(thing.mT, batch.thing, weight=weight, ignore_index=IGNORE),
        "thing_acc": (thing.argmax(-1) == batch.thing)[some].float().mean(),
        "color": F.cross_entropy(color.mT, batch.color, ignore_index=IGNORE),
    }


if __name__ == "__main__":
    run_command(VitTrainer, "ViT classifier")
