"""Trains the predictors of Sparsifiner: each is to guess the attention map of its block.

That is the first phase of the authors, who then train the ViT along with them; here it stays as it
is. What is minimised is the squared error of a block's map as it is guessed, in units of what it is
from the mean over keys.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from vtprune.eval.train_beside import BesideTrainer, attending
from vtprune.eval.train_loop import Stage
from vtprune.eval.train_vit import Shown
from vtprune.scoring.connectivity import Connectivity, among_highest, n_seen

REDUCED = 6  # tokens per landmark
LOGGED = 25  # steps
RATE = 0.25  # of keys that a query sees, by which it is said how much of its attention they have


class SparsifinerTrainer(BesideTrainer):
    """Trains a predictor per block."""

    heads: nn.ModuleList

    def __init__(self, model: Any, out: Path, stages: tuple[Stage, ...]) -> None:
        blocks = model.blocks
        d = blocks[0].attn.head_dim
        tokens = model.patch_embed.num_patches + model.num_prefix_tokens
        heads = nn.ModuleList(begin(tokens, d) for _ in blocks)
        super().__init__(model, heads, out, stages)

    def losses(self, stage: Stage, batch: Shown) -> dict[str, Tensor]:
        apart: list[Tensor] = []
        held: list[Tensor] = []

        def attention(layer: int, *given: Tensor) -> Tensor:
            _, _, q, k, v = given
            true = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
            predictor = cast(Connectivity, self.heads[layer])
            with torch.enable_grad():
                guess = predictor.approximate(q, k, faint=0.0)
                p = self.adapter.n_prefix
                wrong = (guess - true)[:, :, p:].square().sum()
                spread = (true - true.mean(-1, keepdim=True))[:, :, p:].square().sum()
                apart.append(wrong / spread)
            held.append(self._held(true, guess)[:, :, p:].mean())
            return true @ v

        with torch.no_grad(), attending(self.adapter, attention):
            self.model(batch.pixels)
        return {"map": torch.stack(apart).mean(), "held_acc": torch.stack(held).mean()}

    def _held(self, true: Tensor, guess: Tensor) -> Tensor:
        """Returns what part of its attention each query has for keys that it would see.

        ``[B, H, S]``, NaN but for the step that is logged, as it takes as long as all the rest.
        """
        if (self.step + 1) % LOGGED:
            return torch.full(true.shape[:3], torch.nan)
        return (true * among_highest(guess, n_seen(RATE, guess.shape[-1]))).sum(-1)


def begin(tokens: int, d: int) -> Connectivity:
    """Returns an untrained predictor."""
    made = Connectivity(tokens, d, max(8, tokens // REDUCED))
    nn.init.normal_(made.down, std=tokens**-0.5)
    nn.init.uniform_(made.up, 0.0, 2.0 / tokens)
    return made
