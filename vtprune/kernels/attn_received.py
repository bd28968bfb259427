"""Attention that each key receives from all queries, without an N x N matrix."""

from __future__ import annotations

from torch import Tensor

from vtprune.kernels._attention import mean_probability
from vtprune.kernels._common import MIB


def attn_received(
    q: Tensor, k: Tensor, *, scale: float | None = None, chunk_bytes: int = 256 * MIB
) -> Tensor:
    """Returns the attention each key receives, mean over heads and over all queries.

    The softmax runs in float32 over all keys. Not differentiable.

    Args:
        q: ``[B, H, M, d]`` all queries.
        k: ``[B, Hkv, N, d]`` all keys; H a multiple of Hkv (grouped heads are not repeated).
        scale: factor of the logits; None = ``d ** -0.5``.
        chunk_bytes: most bytes of probabilities held at a time: the queries are taken in chunks.

    Returns:
        ``[B, N]`` float32; each row sums to 1.

    Raises:
        InputError: shapes that do not fit together.
    """
    return mean_probability(q, k, scale, chunk_bytes, "attn_received")
