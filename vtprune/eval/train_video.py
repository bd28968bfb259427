"""Trains the shipped video model on generated clips; it starts as mini-qwen.

    python -m vtprune.eval.train_video --out runs/mini-video

Its tower stays mini-qwen's; the language model learns what questions about clips take. Resumed from
the last checkpoint when the command is given again.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration

from vtprune.eval import shipped, train_attention
from vtprune.eval.clip_questions import KINDS
from vtprune.eval.clips import MOMENTS, SIDE, WAYS
from vtprune.eval.mini_qwen import END, PATCH, PREFIX, TOKEN, WIDTH
from vtprune.eval.mini_video import build_model, build_processor
from vtprune.eval.scene_things import NAMES
from vtprune.eval.train_answering import Words, answering_losses, lookup, packed_mask
from vtprune.eval.train_clips import AGES, ClipBatch, ClipWriter
from vtprune.eval.train_data import BLOCK, IGNORE, N_BLOCKS
from vtprune.eval.train_loop import Show, Stage, Trainer, run_command
from vtprune.eval.train_qwen import mrope_positions
from vtprune.eval.train_seeing import rarer_nothing

# Layers of the language model: the first knows what was there, the next what became of it, and the
# last looks there.
FINDING, KNOWING, LOOKING = 3, 6, 8
GRID = SIDE // TOKEN
STAGES = (Stage("answer", 1900, 1e-3, ("llm",), batch=8, warmup=60),)


class PastHeads(nn.Module):
    """Readouts of what a visual token's layer knows of the past, used in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.way = nn.Linear(WIDTH, len(WAYS))
        self.age = nn.Linear(WIDTH, AGES + 1)
        self.turned = nn.Linear(WIDTH, 2)
        self.earlier = nn.LayerNorm(WIDTH)
        self.was = nn.Linear(WIDTH, 1 + len(NAMES))


class VideoTrainer(Trainer):
    """Trains ``mini-video`` from ``mini-qwen`` on."""

    first = 300_000_000
    heads: PastHeads

    def __init__(self, out: Path, device: torch.device) -> None:
        model, processor = build_model(), build_processor()
        inherit(model, shipped.load("mini-qwen")[0])
        train_attention.use(model, windowed=model.model.visual)
        layers = model.model.language_model.layers
        self.looking: Any = layers[LOOKING].self_attn
        for watched in (lookup(model), self.looking):
            train_attention.watch(watched)
        self.known: dict[int, Tensor] = {}
        for number in (FINDING, KNOWING):
            layers[number].register_forward_hook(partial(self._keep, number))
        self.words = Words.of(processor.tokenizer, device, PREFIX, [END])
        self.stages = STAGES
        super().__init__(nn.Module.to(model, device), processor, PastHeads().to(device), out)

    def show(self, stage: Stage, n: int) -> Show:
        return ClipWriter(self.processor.tokenizer, n)

    def save(self, folder: Path) -> None:
        """Saves it in float16, half as large."""
        self.model.half()
        super().save(folder)

    def losses(self, stage: Stage, batch: ClipBatch) -> dict[str, Tensor]:
        with torch.autocast(self.device.type, torch.bfloat16):
            with torch.no_grad():
                image = see_clips(self.model, batch.pixels)
            positions = mrope_positions(len(self.words.before), GRID, GRID, MOMENTS)
            positions = positions.to(self.device)[:, None].expand(-1, len(image), -1)
            values = answering_losses(self.model, image, batch, self.words, positions, KINDS)
            values |= self._past_losses(batch)
            values["there"] = 0.3 * self._there_loss(batch, image.shape[1])
        return values

    def _keep(self, number: int, module: nn.Module, args: Any, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output
        first = len(self.words.before)
        self.known[number] = states[:, first : first + MOMENTS * GRID**2]

    def _past_losses(self, batch: ClipBatch) -> dict[str, Tensor]:
        """Losses and accuracies of the readouts."""
        known = self.heads.norm(self.known[KNOWING])
        was = self.heads.was(self.heads.earlier(self.known[FINDING])).float()
        weight, some = rarer_nothing(was), batch.was > 0
        values = {
            "was": F.cross_entropy(was.mT, batch.was, weight=weight, ignore_index=IGNORE),
            "was_acc": (was.argmax(-1) == batch.was)[some].float().mean(),
        }
        for name in ("way", "age", "turned"):
            wanted = getattr(batch, name)
            mine = wanted != IGNORE
            logits = getattr(self.heads, name)(known[mine]).float()
            values[name] = 0.3 * F.cross_entropy(logits, wanted[mine])
            values[f"{name}_acc"] = (logits.argmax(-1) == wanted[mine]).float().mean()
        return values

    def _there_loss(self, batch: ClipBatch, n: int) -> Tensor:
        """Teaches one head to look, before it answers, at what has the answer."""
        queries, keys = self.looking.seen
        before = len(self.words.before)
        prefix = before + n + len(self.words.after)
        labels = batch.labels.unflatten(1, (N_BLOCKS, BLOCK))
        at = prefix + BLOCK * torch.arange(N_BLOCKS, device=labels.device)
        at = at + (labels != IGNORE).int().argmax(-1)  # [B, N_BLOCKS], of the first answering word
        asked = batch.looks.any(-1)
        clip, _ = asked.nonzero().unbind(1)
        rows, every = queries[clip, 0, at[asked]].float(), keys[clip, 0].float()
        logits = (rows[:, None] * every).sum(-1) * rows.shape[-1] ** -0.5
        hidden = ~packed_mask(prefix, logits.device)[0, 0][at[asked]]
        logits = logits.masked_fill(hidden, -torch.inf)
        right = logits[:, before : before + n].masked_fill(~batch.looks[asked], -torch.inf)
        return (logits.logsumexp(-1) - right.logsumexp(-1)).mean()


@torch.no_grad()
def inherit(model: Qwen2_5_VLForConditionalGeneration, teacher: nn.Module) -> None:
    """Starts the model as the teacher; words that are new keep theirs."""
    given = teacher.state_dict()
    for name, tensor in model.state_dict().items():
        tensor[: len(given[name])] = given[name]


def see_clips(model: Qwen2_5_VLForConditionalGeneration, pixels: Tensor) -> Tensor:
    """Visual tokens ``[B, N, D]`` of clips ``[B, 3, F, H, W]``."""
    n, _, frames, height, width = pixels.shape
    grid = [[frames // 2, height // PATCH, width // PATCH]] * n
    grids = torch.tensor(grid, device=pixels.device)
    tokens = model.model.visual(patchify(pixels), grid_thw=grids).pooler_output
    return tokens.unflatten(0, (n, -1))


def patchify(pixels: Tensor) -> Tensor:
    """Patches ``[P, C * T * p * p]`` of clips as Qwen's processor orders them."""
    n, channels, frames, height, width = pixels.shape
    cells = (height // TOKEN, 2, PATCH, width // TOKEN, 2, PATCH)
    x = pixels.reshape(n, channels, frames // 2, 2, *cells)
    return x.permute(0, 2, 4, 7, 5, 8, 1, 3, 6, 9).flatten(6).flatten(0, 5)


if __name__ == "__main__":
    run_command(VideoTrainer, "video model")
