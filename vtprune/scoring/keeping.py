"""Which patches are worth keeping, by a small trained head: the predictor of DynamicViT.

arXiv 2106.02034 (raoyongming/DynamicViT).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from vtprune.kernels._common import full_precision


class Keeper(nn.Module):
    """The predictor before one block, of states ``width`` wide."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.enter = nn.LayerNorm(width), nn.Linear(width, width)
        self.first = nn.Linear(width, width // 2)
        self.second = nn.Linear(width // 2, width // 4)
        self.last = nn.Linear(width // 4, 2)

    def forward(self, x: Tensor, alive: Tensor | None = None) -> Tensor:
        """Returns log-probabilities of each patch, to keep and to drop, ``[B, N, 2]`` float32.

        A patch is judged by itself and by the mean of all that are alive.

        Args:
            x: ``[B, N, C]``, the patches as they enter the block.
            alive: ``[B, N]``, 1 of those still there, 0 of others; None = all are.
        """
        gelu = functional.gelu
        with full_precision(x):
            units = gelu(self.enter(self.norm(x.float())))
            own, common = units.chunk(2, dim=-1)
            weight = torch.ones_like(own[..., :1]) if alive is None else alive[..., None].float()
            mean = (common * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True)
            units = torch.cat([own, mean.expand_as(own)], dim=-1)
            return self.last(gelu(self.second(gelu(self.first(units))))).log_softmax(-1)


def masked_attention(logits: Tensor, alive: Tensor, eps: float = 1e-6) -> Tensor:
    """Returns the attention map where tokens that are not alive are seen by none but themselves.

    The differentiable form that training takes, where ``alive`` is a decision of the predictor.

    Args:
        logits: ``[B, H, S, S]``; alive: ``[B, S]``, 0 or 1.
    """
    own = torch.eye(logits.shape[-1], device=logits.device)
    seen = alive[:, None, None] * (1 - own) + own
    weight = (logits - logits.amax(-1, keepdim=True)).exp() * seen
    n = logits.shape[-1]
    return (weight + eps / n) / (weight.sum(-1, keepdim=True) + eps)
