"""What the cases of video methods share: signals of a clip, and counts per frame."""

from __future__ import annotations

import torch
from torch import Tensor

from vtprune.types import Budget, Signals


def clip(tokens: Tensor, frames: int, share: float) -> Signals:
    """Signals of one video of ``tokens`` ``[T, N, D]`` or ``[T * N, D]``."""
    flat = tokens.reshape(-1, tokens.shape[-1])
    return Signals(flat[None], (frames, 1, len(flat) // frames), budget=Budget(fraction=share))


def per_frame(kept: Tensor, frames: int, n: int) -> Tensor:
    """How many of the flat indices ``kept`` lie in each frame, ``[T]``."""
    return torch.bincount(kept // n, minlength=frames)
