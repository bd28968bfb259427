"""Keeps a random subset: the baseline that every method has to beat (a baseline of this package).

The draw depends on the seed and on the number of tokens only, so every image keeps the same places
and a run repeats exactly. Defaults: ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vtprune.errors import ConfigError
from vtprune.types import Signals, Strategy


@dataclass(frozen=True)
class Random(Strategy):
    """``seed`` (>= 0) chooses the subset."""

    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise ConfigError(f"seed={self.seed!r} must be a whole number of at least 0.")

    def score(self, signals: Signals) -> Tensor:
        draw = _drawn(self.seed, signals.n)
        return draw.to(signals.tokens.device).expand(len(signals.tokens), -1)


@torch.compiler.assume_constant_result
def _drawn(seed: int, n: int) -> Tensor:
    """Returns a number for each token, ``[n]``, on the CPU: the same on every device."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.rand(n, generator=generator, device="cpu")
