"""Trains the shipped Qwen2.5-VL on generated scenes, with mini-llava as its teacher.

    python -m vtprune.eval.train_qwen --out runs/mini-qwen

The language model starts as mini-llava's, and the tower learns to give it, at each visual token,
the features that mini-llava's tower and projector give there. Stages, each resumed from its last
checkpoint when the command is given again:

1. ``adapt``: the language model alone gets used to M-RoPE and its prompt, on mini-llava's
   features.
2. ``dense``: the tower alone, on 64 x 64 crops of images full of things; beside the features to
   copy it has targets per visual token (what is here, its color and place, what is beside).
3. ``sparse``: the same on whole images of several sizes, half of them scenes as they are asked
   about.
4. ``joint``: everything, on questions too.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, Qwen2_5_VLForConditionalGeneration

from vtprune.eval import mini_llava, scenes, shipped, train_attention
from vtprune.eval.mini_qwen import END, PATCH, PREFIX, TOKEN, WIDTH, build_model, build_processor
from vtprune.eval.scene_things import SIZE
from vtprune.eval.train_answering import Words, answering_losses, block_positions, lookup
from vtprune.eval.train_data import Batch
from vtprune.eval.train_llava import see
from vtprune.eval.train_loop import Stage, Trainer, run_command
from vtprune.eval.train_seeing import TokenHeads, token_losses

NATIVE = (SIZE, SIZE)
# Height and width; multiples of 32, so that all windows are equally long.
OTHERS = ((96, 96), (160, 160), (96, 160), (160, 96), (128, 160), (160, 128), (64, 128), (192, 128))
SIZES = tuple(size for other in OTHERS for size in (NATIVE, NATIVE, other))
CROWDED = (scenes.DENSE, "standard", scenes.DENSE, "hard")
STAGES = (
    Stage("adapt", 300, 8e-4, ("llm",), batch=8, warmup=60),
    Stage("dense", 400, 1.5e-3, ("tower",), (scenes.DENSE,), part=8, warmup=60, crop=64),
    Stage("sparse", 1150, 1.5e-3, ("tower",), CROWDED, batch=16, part=8, warmup=60, sizes=SIZES),
    Stage("joint", 1200, 8e-4, ("tower", "llm"), batch=8, part=4, warmup=60, sizes=SIZES),
)


class QwenTrainer(Trainer):
    """Trains ``mini-qwen`` with ``mini-llava`` as its teacher."""

    first = 100_000_000  # mini-llava's training ends before it
    heads: TokenHeads

    def __init__(self, out: Path, device: torch.device) -> None:
        model, processor = build_model(), build_processor()
        teacher = cast(Any, shipped.load("mini-llava", str(device))[0])
        inherit(model, teacher)
        look_at_alike(model)
        train_attention.use(model, windowed=model.model.visual)
        train_attention.watch(lookup(model))
        self.teacher = teacher.requires_grad_(False)
        self.words = Words.of(processor.tokenizer, device, PREFIX, [END])
        self.stages = STAGES
        super().__init__(nn.Module.to(model, device), processor, TokenHeads().to(device), out)

    def losses(self, stage: Stage, batch: Batch) -> dict[str, Tensor]:
        grid = batch.pixels.shape[2] // TOKEN, batch.pixels.shape[3] // TOKEN
        values: dict[str, Tensor] = {}
        with torch.autocast(self.device.type, torch.bfloat16):
            wanted = self._wanted(batch, grid)
            image = wanted
            if "tower" in stage.train:
                if stage.crop:
                    batch, wanted = crop(batch, wanted, grid, stage.crop // TOKEN)
                image = see_windows(self.model, batch.pixels)
                values = {"copy": copy_loss(image, wanted)}
                values |= token_losses(self.heads, image, batch)
            if "llm" in stage.train:
                positions = mrope_positions(len(self.words.before), *grid).to(self.device)
                positions = positions[:, None].expand(-1, len(image), -1)
                values |= answering_losses(self.model, image, batch, self.words, positions)
        return values

    @torch.no_grad()
    def _wanted(self, batch: Batch, grid: tuple[int, int]) -> Tensor:
        """What mini-llava gives its language model, ``[B, N, D]`` on a grid of this shape."""
        states, _ = see(self.teacher, batch.native)
        features = self.teacher.model.multi_modal_projector(states[:, 1:])
        if grid == (mini_llava.GRID, mini_llava.GRID):
            return features
        square = features.mT.unflatten(-1, (mini_llava.GRID, mini_llava.GRID)).float()
        resized = F.interpolate(square, grid, mode="bilinear", antialias=True)
        return resized.flatten(2).mT.to(features.dtype)


@torch.no_grad()
def inherit(
    model: Qwen2_5_VLForConditionalGeneration, teacher: LlavaForConditionalGeneration
) -> None:
    """Starts the language model as the teacher's; biases are 0, words that are new keep theirs."""
    given = teacher.model.language_model.state_dict()
    for name, tensor in model.model.language_model.state_dict().items():
        if name in given:
            tensor[: len(given[name])] = given[name]
        else:
            tensor.zero_()  # biases of queries, keys and values, which Llama lacks
    weight = teacher.lm_head.weight
    model.lm_head.weight[: len(weight)] = weight


@torch.no_grad()
def look_at_alike(model: Qwen2_5_VLForConditionalGeneration) -> None:
    """Starts the tower's attention with equal query and key projections, as mini-llava's."""
    for block in model.model.visual.blocks:
        weight = cast(Any, block).attn.qkv.weight
        nn.init.normal_(weight[:WIDTH], std=0.1)
        weight[WIDTH : 2 * WIDTH] = weight[:WIDTH]


def see_windows(model: Qwen2_5_VLForConditionalGeneration, pixels: Tensor) -> Tensor:
    """Visual tokens ``[B, N, D]`` of images ``[B, 3, H, W]``."""
    n, _, height, width = pixels.shape
    grid = torch.tensor([[1, height // PATCH, width // PATCH]] * n, device=pixels.device)
    tokens = model.model.visual(patchify(pixels), grid_thw=grid).pooler_output
    return tokens.unflatten(0, (n, -1))


def patchify(pixels: Tensor) -> Tensor:
    """Patches ``[P, C * T * p * p]`` as Qwen's processor orders them; two equal frames each."""
    n, channels, height, width = pixels.shape
    x = pixels.reshape(n, channels, height // TOKEN, 2, PATCH, width // TOKEN, 2, PATCH)
    x = x.permute(0, 2, 5, 3, 6, 1, 4, 7)[:, :, :, :, :, :, None]
    return x.expand(*x.shape[:6], 2, PATCH, PATCH).flatten(5).flatten(0, 4)


def mrope_positions(before: int, rows: int, cols: int, moments: int = 1) -> Tensor:
    """M-RoPE positions ``[3, S]`` of ``before`` words, what is seen, a word and question blocks.

    That is an image, or a video of so many ``moments``.
    """
    seen = torch.ones(moments, rows, cols).nonzero().T  # time, row, column of each token
    image = before + seen
    after = before + max(moments, rows, cols)
    text = torch.cat([torch.tensor([after]), block_positions(after + 1, torch.device("cpu"))])
    return torch.cat([torch.arange(before).expand(3, -1), image, text.expand(3, -1)], dim=1)


def copy_loss(image: Tensor, wanted: Tensor) -> Tensor:
    """Squared error of ``image`` ``[B, N, D]`` as a share of the variance of what is wanted."""
    image, wanted = image.float(), wanted.float()
    variance = (wanted - wanted.mean((0, 1))).pow(2).mean()
    return (image - wanted).pow(2).mean() / variance


def crop(batch: Batch, wanted: Tensor, grid: tuple[int, int], side: int) -> tuple[Batch, Tensor]:
    """Cuts images, their targets per token and ``wanted`` into squares of ``side`` tokens."""
    parts = {
        name: _cut(getattr(batch, name).unflatten(-1, grid), side)
        for name in ("thing", "color", "place", "sides")
    }
    pixels = _squares(batch.pixels, side * TOKEN)
    return replace(batch, pixels=pixels, **parts), _cut(wanted.mT.unflatten(-1, grid), side).mT


def _cut(grid: Tensor, side: int) -> Tensor:
    return _squares(grid, side).flatten(-2)


def _squares(grid: Tensor, side: int) -> Tensor:
    """``[B, ..., h, w]`` to ``[B * k, ..., side, side]``."""
    squares = grid.unfold(-2, side, side).unfold(-2, side, side)  # [B, ..., n, m, side, side]
    return squares.movedim((-4, -3), (1, 2)).flatten(0, 2)


if __name__ == "__main__":
    run_command(QwenTrainer, "Qwen2.5-VL")
