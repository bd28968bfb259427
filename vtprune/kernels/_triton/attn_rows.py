"""Launches the two passes over attention for a few queries; see ``_attention.py``."""

from __future__ import annotations

from torch import Tensor

from vtprune.kernels._triton.attn_received import key_means


def launch(q: Tensor, k: Tensor, scale: float, seen: Tensor | None) -> Tensor:
    """Returns the mean attention that each key gets, ``[B, N]`` float32."""
    return key_means(q, k, scale, seen=seen, few=True)
