"""Attention turned around, in which tokens send and may fall silent: that of DependencyViT.

arXiv 2304.03282. A token shares itself out among those it attends to, its parents, and they receive
what it sends; a selector says through which heads, a controller how loud, from block to block less.

B images, H heads, S tokens, C width of the states.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from vtprune.kernels._common import full_precision

TEMPERATURE = 0.1  # of the selector, appendix D.1 of the paper


class Messenger(nn.Module):
    """Selector and controller of one block, of states ``width`` wide and ``heads`` heads."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = nn.Linear(width, heads, bias=False)
        self.first, self.second = nn.Linear(width, width // 2), nn.Linear(width // 2, 1)

    def select(self, x: Tensor) -> Tensor:
        """Returns the share of each head in what a token sends, ``[B, H, S]`` float32.

        Args:
            x: ``[B, S, C]``, what queries are made of.
        """
        with full_precision(x):
            chosen = functional.linear(x.float(), self.heads.weight.float()) / TEMPERATURE
        return chosen.softmax(-1).mT

    def control(self, x: Tensor) -> Tensor:
        """Returns what is left of the loudness of each token, ``[B, S]`` float32, 0 to 1."""
        with full_precision(x):
            units = functional.gelu(_linear(self.first, x.float()))
            return _linear(self.second, units)[..., 0].sigmoid()


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return functional.linear(x, layer.weight.float(), layer.bias.float())


def reversed_attention(logits: Tensor, v: Tensor, sent: Tensor) -> Tensor:
    """Returns what tokens receive from those that attend to them, ``[B, H, S, d]``.

    Args:
        logits: ``[B, H, S, S]``, from a token that sends (query) to those it may send to (keys).
        v: ``[B, H, S, d]``; sent: ``[B, H, S]``, how much a token sends through each head.
    """
    with full_precision(v):
        return logits.softmax(-1).mT @ (v.to(logits.dtype) * sent[..., None])


def silent(sent: Tensor, real: Tensor | None) -> Tensor:
    """Returns ``sent`` ``[B, S]`` with 0 where ``real`` ``[B, S]`` says there is no token."""
    return sent if real is None else torch.where(real, sent, 0.0)
