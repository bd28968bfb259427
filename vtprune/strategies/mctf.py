"""MCTF: merge patches that are alike, receive little attention and stand for few.

In every block but the first, the better half of what is to merge goes from even places of the
sequence to odd ones, and the rest back, to patches at even places that are left. A pair is as good
as the product of three powers: of the likeness of the hidden states, of the inverse attention that
both receive, and of their inverse sizes. A token is the mean of what it is made of, weighted by
attention and size, and later blocks give it attention for all of its patches. CVPR 2024,
arXiv 2403.10030 (mlvlab/MCTF). In a ViT by itself all that happens one step ahead: the block's
attention map is computed once, of what enters it, and merged with the tokens, columns added up and
rows averaged, so that the attention that tells what matters is the one that is used. In the tower
of a language model tokens merge at the end of a block. Every block merges equally many, so that
``keep`` is met exactly, repeatedly where halving is not enough. Between blocks tokens wait in the
official order, those at even places first, which decides the halves of the next block; no token of
the prefix takes part. Where a visual token is made of several patches, projected tokens are merged
in one go. Defaults: official code, but for the blocks and the count, which are the paper's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vtprune.errors import ConfigError
from vtprune.scoring.criteria import TINY, Temperatures, Traits, merge_both_ways
from vtprune.scoring.matching import ascending, averaged
from vtprune.strategies._ahead import Ahead
from vtprune.types import Facts, Received, Selection, Signals, TowerNeed

POOLS = ("attention", "size", "mean")


@dataclass(frozen=True)
class MCTF(Ahead):
    """``layers`` are the blocks that merge, by default all but the first.

    ``tau_likeness``, ``tau_attention`` and ``tau_size``: how little each criterion counts.
    ``both_ways``: whether patches at odd places merge too. ``pool``: what weighs in a mean, the
    received ``attention`` times size, ``size`` alone, or nothing (``mean``).
    ``one_step_ahead``: whether to merge the attention map of the block, where the model gives it,
    instead of merging at its end. ``prop_attn``: whether a merged token gets attention for all
    patches it stands for.
    """

    tau_likeness: float = 1.0
    tau_attention: float = 20.0
    tau_size: float = 40.0
    both_ways: bool = True
    pool: Literal["attention", "size", "mean"] = "attention"

    def __post_init__(self) -> None:
        for name in ("tau_likeness", "tau_attention", "tau_size"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name}={getattr(self, name)!r} must be a number above 0.")
        if self.pool not in POOLS:
            raise ConfigError(f"pool={self.pool!r} is unknown; choose {', '.join(POOLS)}.")

    def default_layers(self, facts: Facts) -> tuple[int, ...]:
        every = super().default_layers(facts)
        return every[1:] or every

    def read(self, layer: int, facts: Facts) -> tuple[TowerNeed, ...]:
        return (Received(layer),)

    def select(self, signals: Signals, k: int) -> Selection:
        received = signals.stack(Received)[-1].float()  # [B, N]
        size = torch.ones_like(received) if signals.size is None else signals.size
        traits = Traits(signals.tokens, received, size, self.weight(received, size))
        by = Temperatures(self.tau_likeness, self.tau_attention, self.tau_size)
        rows, into = merge_both_ways(traits, k, signals.n_prefix, by, self.both_ways)
        if signals.inside is None:
            rows, into = ascending(rows, into)
        return averaged(rows, into, traits.weight)

    def weight(self, received: Tensor, size: Tensor) -> Tensor:
        """Returns how much each token counts in a mean, ``[B, N]`` float32."""
        if self.pool == "mean":
            return torch.ones_like(size)
        if self.pool == "size":
            return size
        return (received.nan_to_num(0.0, 0.0, 0.0) * size).clamp(min=TINY)
