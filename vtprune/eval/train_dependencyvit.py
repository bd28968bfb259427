"""Trains a DependencyViT on the pictures of the shipped classifier, which it starts as.

Attention that is turned around is another function, so all weights learn. It has no [CLS]: patches
are averaged, each as loud as it is. Stages, each resumed from its last checkpoint:

1. ``crowded``: pictures full of things, as the classifier saw them; all patches stay.
2. ``single``: pictures of one thing, of which as many patches leave as in the paper.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vtprune
from vtprune.eval import mini_vit
from vtprune.eval._extras import need
from vtprune.eval.train_loop import Show, Stage, Trainer
from vtprune.eval.train_vit import CROWDS, Heads, Shown, shown, token_losses
from vtprune.scoring.messages import Messenger
from vtprune.strategies.dependencyvit import MESSENGERS
from vtprune.trained import write

ARGS = mini_vit.ARGS | {"class_token": False, "global_pool": "avg", "fc_norm": False}
CONFIG = mini_vit.CONFIG | {"global_pool": "avg", "model_args": ARGS}
FIRST = 800_000_000  # training picture; far behind those that the classifier has seen
STAGES = (
    Stage("crowded", 1200, 1e-3, ("tower",), batch=16),
    Stage("single", 5500, 5e-4, ("tower",), batch=16),
)
LEFT = {"crowded": 1.0, "single": 0.36}  # of the patches, in the end
LOUD = 3.0  # what controllers begin with, before the sigmoid


class Learning(nn.Module):
    """Everything beside the ViT that learns: its messengers, and readouts used in training only."""

    def __init__(self, depth: int, width: int, heads: int) -> None:
        super().__init__()
        self.messengers = nn.ModuleList(begin(width, heads) for _ in range(depth))
        self.readouts = Heads()


class DependencyViTTrainer(Trainer):
    """Trains a ViT without [CLS], and its messengers."""

    heads: Learning
    first = FIRST

    def __init__(self, start: Any, out: Path, stages: tuple[Stage, ...] = STAGES) -> None:
        model = without_cls(start)
        blocks = model.blocks
        self.stages = stages
        heads = Learning(len(blocks), model.embed_dim, blocks[0].attn.num_heads)
        super().__init__(model, None, heads, out)

    def show(self, stage: Stage, n: int) -> Show:
        return lambda first, size: shown(first, n, CROWDS[stage.name])

    def losses(self, stage: Stage, batch: Shown) -> dict[str, Tensor]:
        left, messengers = LEFT[stage.name], self.heads.messengers
        with torch.autocast(self.device.type, torch.bfloat16):
            with vtprune.wrap(self.model, "dependencyvit", keep=left, messengers=messengers):
                states = self.model.forward_features(batch.pixels)
                logits = self.model.forward_head(states).float()
            values = {}
            if left == 1:
                values = token_losses(self.heads.readouts, states, batch)
        seen = batch.share.gather(1, logits.argmax(-1, keepdim=True)) > 0
        return {
            "class": F.cross_entropy(logits, batch.share),
            "class_acc": seen.float().mean(),
            **values,
        }

    def save(self, folder: Path) -> None:
        mini_vit.save_with(self.model, folder, mini_vit.FILES, CONFIG)
        write(self.heads.messengers.state_dict(), folder / MESSENGERS.file)


@torch.no_grad()
def without_cls(start: Any) -> Any:
    """Returns a ViT that averages patches, with the weights of one that has [CLS]."""
    timm = need("timm", extra="vit")
    model = timm.create_model(mini_vit.ARCHITECTURE, pretrained=False, **ARGS)
    state = {k: v for k, v in start.state_dict().items() if k != "cls_token"}
    state["pos_embed"] = state["pos_embed"][:, start.num_prefix_tokens :]
    model.load_state_dict(state)
    return model


def begin(width: int, heads: int) -> Messenger:
    """Returns a messenger that sends alike through all heads, and is loud."""
    made = Messenger(width, heads)
    nn.init.zeros_(made.heads.weight)
    nn.init.constant_(made.second.bias, LOUD)
    return made
