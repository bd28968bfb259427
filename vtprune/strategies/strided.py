"""Keeps tokens at even distances along the raster: a baseline that looks at nothing.

It covers the whole image at a lower resolution and costs no computation. Defaults: none.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vtprune.types import Selection, Signals, Strategy


@dataclass(frozen=True)
class Strided(Strategy):
    """The i-th of k kept tokens lies in the middle of the i-th of k equal stretches."""

    def select(self, signals: Signals, k: int) -> Selection:
        middle = (2 * torch.arange(k, device=signals.tokens.device) + 1) * signals.n // (2 * k)
        return Selection(middle.expand(len(signals.tokens), k), signals.n)
