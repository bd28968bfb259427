"""Trains the shipped LLaVA on generated scenes: first to see, then to answer.

    python -m vtprune.eval.train_llava --out runs/mini-llava

Stages, each resumed from its last checkpoint when the command is given again:

1. ``dense``: the vision tower alone, on images full of things; targets per patch (what is here, in
   which color) and per image (what is present), the latter read from the CLS of the block that
   yields the features, so that CLS attention points at content.
2. ``sparse``: the same on the scenes as they are asked about.
3. ``answer``: projector and language model on questions, tower frozen.
4. ``joint``: everything, with the tower's targets kept.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from vtprune.eval import scenes, train_attention
from vtprune.eval.mini_llava import PREFIX, build_model, build_processor
from vtprune.eval.train_answering import Words, answering_losses, lookup, packed_positions
from vtprune.eval.train_data import Batch
from vtprune.eval.train_loop import Stage, Trainer, run_command, sum_losses
from vtprune.eval.train_seeing import ImageHeads, TokenHeads, image_losses, token_losses

STAGES = (
    Stage("dense", 1200, 1.5e-3, ("tower",), (scenes.DENSE,)),
    Stage("sparse", 900, 1e-3, ("tower",)),
    Stage("answer", 4800, 1.2e-3, ("llm",), batch=8),
    Stage("joint", 1600, 5e-4, ("tower", "llm"), batch=8, tower_lr=0.3),
)


class Heads(nn.Module):
    """Readouts per patch and per image."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.image = TokenHeads(), ImageHeads()


class LlavaTrainer(Trainer):
    """Trains ``mini-llava`` from scratch."""

    heads: Heads

    def __init__(self, out: Path, device: torch.device) -> None:
        model, processor = nn.Module.to(build_model(), device), build_processor()
        train_attention.use(model)
        train_attention.watch(lookup(model))
        self.words = Words.of(processor.tokenizer, device, PREFIX)
        self.stages = STAGES
        super().__init__(model, processor, Heads().to(device), out)

    def losses(self, stage: Stage, batch: Batch) -> dict[str, Tensor]:
        train_tower, train_llm = "tower" in stage.train, "llm" in stage.train
        with torch.autocast(self.device.type, torch.bfloat16):
            with torch.set_grad_enabled(train_tower):
                states, last = see(self.model, batch.pixels)
            values: dict[str, Tensor] = {}
            if train_tower:
                values = self._seeing_losses(states, batch)
                late = self._seeing_losses(last, batch)
                values["late"] = 0.25 * sum_losses(late)
            if train_llm:
                image = self.model.model.multi_modal_projector(states[:, 1:])
                prefix = len(self.words.before) + image.shape[1]
                positions = packed_positions(prefix, image.device)[None]
                values |= answering_losses(self.model, image, batch, self.words, positions)
        return values

    def _seeing_losses(self, states: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Losses and accuracies of the readouts on ``states`` ``[B, 1 + N, D]``."""
        tokens = token_losses(self.heads.tokens, states[:, 1:], batch)
        return tokens | image_losses(self.heads.image, states[:, 0], batch)


def see(model: LlavaForConditionalGeneration, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states ``[B, 1 + N, D]`` that yield the features, and those after the last block."""
    states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    return states[-2], states[-1]


if __name__ == "__main__":
    run_command(LlavaTrainer, "LLaVA")
