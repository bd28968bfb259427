"""Attention of a few query rows to every key, without the rest of the attention matrix."""

from __future__ import annotations

from torch import Tensor

from vtprune.kernels._attention import mean_probability
from vtprune.kernels._common import MIB


def attn_rows(
    q: Tensor,
    k: Tensor,
    *,
    scale: float | None = None,
    seen: Tensor | None = None,
    chunk_bytes: int = 256 * MIB,
) -> Tensor:
    """Returns the attention of the given queries to each key, mean over heads and queries.

    The softmax runs in float32 over all keys, or over those ``seen``. Not differentiable.

    Args:
        q: ``[B, H, M, d]`` the query rows, such as the CLS row alone.
        k: ``[B, Hkv, N, d]`` all keys; H a multiple of Hkv (grouped heads are not repeated).
        scale: factor of the logits; None = ``d ** -0.5``.
        seen: ``[M, N]`` bool, the keys that each query sees, at least one; None = all.
        chunk_bytes: most bytes of probabilities held at a time.

    Returns:
        ``[B, N]`` float32; each row sums to 1.

    Raises:
        InputError: shapes that do not fit together.
    """
    return mean_probability(q, k, scale, chunk_bytes, "attn_rows", seen)
