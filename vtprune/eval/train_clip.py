"""Trains the shipped pair of image and text tower on pictures with captions.

    python -m vtprune.eval.train_clip --out runs/mini-clip

The image tower starts as ``mini-vit``. Each picture has to find its caption among those of its
batch and among captions that are wrong about one thing, and each caption its picture. Readouts,
used in training only, say of picture and caption which classes are there, and of each visual token
what it shows, so that the tower does not forget how to read. The command goes on from the last
checkpoint when it is given again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtprune.eval import mini_clip, mini_vit, shipped, train_vit
from vtprune.eval.scene_captions import altered, make_pair, presence, tokenize
from vtprune.eval.scene_objects import CLASSES
from vtprune.eval.train_loop import Show, Stage, Trainer, run_command

STAGES = (Stage("pairs", 650, 8e-4, ("tower",), batch=64, warmup=60),)
SHARPEST = math.log(100)  # of the similarities, as in CLIP


@dataclass
class Shown:
    """One batch: ``pixels`` ``[B, 3, 112, 112]``, words of its captions and of wrong ones.

    ``captions`` and ``wrong`` are ``[B, L]``, ``present`` is ``[B, 112]``; per visual token
    ``[B, N]``: ``thing`` (0 = background) and ``color``.
    """

    pixels: Tensor
    captions: Tensor
    wrong: Tensor
    present: Tensor
    thing: Tensor
    color: Tensor

    def to(self, device: torch.device) -> Shown:
        return Shown(**{name: value.to(device) for name, value in vars(self).items()})


class Heads(train_vit.Heads):
    """Readouts per visual token and per image, used in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.present = nn.Linear(mini_clip.WIDTH, len(CLASSES))


class ClipTrainer(Trainer):
    """Trains ``mini-clip``, with ``mini-vit`` as the start of its image tower."""

    heads: Heads

    def __init__(self, out: Path, device: torch.device) -> None:
        model = mini_clip.build_model()
        inherit(model.visual, mini_vit.load(shipped.MODELS / "mini-vit"))
        model.visual.output_tokens = True  # beside what it makes of the CLS
        for block in model.visual.transformer.resblocks:
            block.attention = partial(attended, block.attn)
        self.stages = STAGES
        super().__init__(model.to(device), None, Heads().to(device), out)

    def show(self, stage: Stage, n: int) -> Show:
        return lambda first, size: shown(first, n)

    def losses(self, stage: Stage, batch: Shown) -> dict[str, Tensor]:
        model, heads = self.model, self.heads
        with torch.autocast(self.device.type, torch.bfloat16):
            image, tokens = model.visual(batch.pixels)
            values = train_vit.token_losses(heads, tokens, batch)
            text = model.encode_text(torch.cat([batch.captions, batch.wrong]))
            said = text[: len(image)]
            present = heads.present(torch.stack([image, said])).float()
        there = batch.present.expand_as(present)
        values["present"] = 20 * F.binary_cross_entropy_with_logits(present, there)
        with torch.no_grad():
            model.logit_scale.clamp_(max=SHARPEST)
        return contrast(image, text, model.logit_scale.exp()) | values

    def save(self, folder: Path) -> None:
        mini_clip.save(self.model, folder)


def attended(attention: nn.MultiheadAttention, q_x: Tensor, **_: Any) -> Tensor:
    """What ``attention`` makes of ``[B, N, D]``; on a CPU its own kernel's backward is slow."""
    qkv = F.linear(q_x, attention.in_proj_weight, attention.in_proj_bias)
    q, k, v = qkv.unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    seen = (q * attention.head_dim**-0.5 @ k.mT).softmax(-1)
    return attention.out_proj((seen @ v).transpose(1, 2).flatten(2))


def contrast(image: Tensor, text: Tensor, scale: Tensor) -> dict[str, Tensor]:
    """The loss of finding each other, and how often a batch does.

    Args:
        image: ``[B, D]``.
        text: ``[2 B, D]``, the captions and after them as many wrong ones.
        scale: of the cosines, a number.
    """
    image, text = (F.normalize(part.float(), dim=-1) for part in (image, text))
    logits = scale * image @ text.T  # [B, 2 B]
    right = torch.arange(len(image), device=image.device)
    back = logits[:, : len(image)].T
    return {
        "contrast": (F.cross_entropy(logits, right) + F.cross_entropy(back, right)) / 2,
        "image_acc": (logits.argmax(1) == right).float().mean(),
        "text_acc": (back.argmax(1) == right).float().mean(),
    }


@torch.no_grad()
def inherit(tower: Any, vit: Any) -> None:
    """Starts open_clip's ``tower`` as timm's ``vit``; what leads out of it stays as it is."""
    tower.class_embedding.copy_(vit.cls_token.flatten())
    tower.positional_embedding.copy_(vit.pos_embed[0])
    tower.conv1.weight.copy_(vit.patch_embed.proj.weight)
    copied = [(tower.ln_pre, vit.norm_pre), (tower.ln_post, vit.norm)]
    for ours, block in zip(tower.transformer.resblocks, vit.blocks, strict=True):
        ours.attn.in_proj_weight.copy_(block.attn.qkv.weight)
        ours.attn.in_proj_bias.copy_(block.attn.qkv.bias)
        copied += [(ours.attn.out_proj, block.attn.proj)]
        copied += [(ours.ln_1, block.norm1), (ours.ln_2, block.norm2)]
        copied += [(ours.mlp.c_fc, block.mlp.fc1), (ours.mlp.c_proj, block.mlp.fc2)]
    for ours, theirs in copied:
        ours.load_state_dict(theirs.state_dict())


def shown(first: int, n: int) -> Shown:
    """The ``n`` training pairs from number ``first`` on."""
    numbers = range(first, first + n)
    pairs = [make_pair(i, "train") for i in numbers]
    things = [pair.picture.things for pair in pairs]
    tokens = torch.from_numpy(np.stack([train_vit.token_targets(some) for some in things]))
    return Shown(
        mini_vit.preprocess([pair.picture for pair in pairs]),
        tokenize([pair.caption for pair in pairs]),
        tokenize([altered(some, i) for some, i in zip(things, numbers, strict=True)]),
        torch.stack([presence(some) for some in things]),
        tokens[:, 0],
        tokens[:, 1],
    )


if __name__ == "__main__":
    run_command(ClipTrainer, "pair of image and text tower")
