"""Trains the predictors of DynamicViT: a ViT is to answer as it does when it sees fewer patches.

The ViT learns nothing, where that of the authors learns along. Their losses: the class, the share
of patches that stay, the answer of the whole ViT, and its tokens where they stay. A decision is
drawn at random and hard, its gradient that of the soft one (Gumbel softmax); dropped patches are
hidden, not taken away.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtprune.eval.train_beside import BesideTrainer, attending
from vtprune.eval.train_loop import Stage
from vtprune.eval.train_vit import Shown
from vtprune.scoring.keeping import Keeper, masked_attention

# Of the patches, each stage keeps. The authors train a ViT for each of .5 to .9; here one set of
# heads is to rank patches for any budget, and learns to by keeping fewer than it will have to.
RHO = 0.3
# The authors weigh the share by 2, but this ViT is hardly ever wrong: with so little the heads kept
# a third where a half was due, and the later ones never learnt which.
WEIGHTS = {"class": 1.0, "share": 20.0, "answer": 0.5, "tokens": 0.5}


class DynamicViTTrainer(BesideTrainer):
    """Trains a predictor before each of the blocks ``before``."""

    heads: nn.ModuleList

    def __init__(
        self, model: Any, out: Path, stages: tuple[Stage, ...], before: tuple[int, ...]
    ) -> None:
        self.before = before
        heads = nn.ModuleList(Keeper(model.embed_dim) for _ in before)
        for block in model.blocks:
            block.attn.fused_attn = False
        super().__init__(model, heads, out, stages)

    def losses(self, stage: Stage, batch: Shown) -> dict[str, Tensor]:
        with torch.autocast(self.device.type, torch.bfloat16):
            with torch.no_grad():
                whole = self.model.forward_features(batch.pixels)
                wanted = self.model.forward_head(whole).float()
            states, alive = self._thinned(batch.pixels)
            logits = self.model.forward_head(states).float()
        stays = alive[-1].detach()  # or patches that come out different would be let go
        p = self.adapter.n_prefix
        apart = (states - whole)[:, p:].float().square().mean(-1)
        found = {
            "class": F.cross_entropy(logits, batch.share),
            "share": _shares(alive),
            "answer": F.kl_div(
                logits.log_softmax(-1),
                wanted.log_softmax(-1),
                reduction="batchmean",
                log_target=True,
            ),
            "tokens": (apart * stays).sum() / stays.sum().clamp(min=1),
        }
        right = (logits.argmax(-1) == batch.share.argmax(-1)).float().mean()
        return {
            **{name: WEIGHTS[name] * value for name, value in found.items()},
            "class_acc": right,
            "left_acc": stays.mean(),
        }

    def _thinned(self, pixels: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Returns the states of all tokens, ``[B, S, C]``, and who was alive after each stage."""
        p, alive = self.adapter.n_prefix, list[Tensor]()

        def attention(layer: int, x: Tensor, normed: Tensor, *qkv: Tensor) -> Tensor:
            q, k, v = qkv
            if layer in self.before:
                keeper = cast(Keeper, self.heads[self.before.index(layer)])
                was = alive[-1] if alive else None
                drawn = F.gumbel_softmax(keeper(x[:, p:], was), hard=True)[..., 0]
                alive.append(drawn if was is None else drawn * was)
            logits = (q @ k.mT * q.shape[-1] ** -0.5).float()
            if not alive:
                return logits.softmax(-1).to(v.dtype) @ v
            return masked_attention(logits, F.pad(alive[-1], (p, 0), value=1.0)).to(v.dtype) @ v

        with attending(self.adapter, attention):
            return self.model.forward_features(pixels), alive


def _shares(alive: list[Tensor]) -> Tensor:
    """Returns how far the shares that stay are from those that are to."""
    apart = [(a.mean(1) - RHO ** (t + 1)).square().mean() for t, a in enumerate(alive)]
    return torch.stack(apart).mean()
