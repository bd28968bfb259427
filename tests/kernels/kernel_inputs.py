"""Inputs shared by the tests of the operations."""

from __future__ import annotations

import torch
from torch import Tensor

SIZES = (1, 7, 8, 9, 123)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Seeded normal numbers, rounded to ``dtype``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype)


def relative_error(got: Tensor, want: Tensor) -> float:
    """Largest deviation by the largest magnitude; infinite where a NaN is."""
    if not bool(got.isfinite().all()):
        return float("inf")
    return float((got.double() - want.double()).abs().max() / want.double().abs().max())


def naive_attention(
    q: Tensor, k: Tensor, scale: float | None = None, seen: Tensor | None = None
) -> Tensor:
    """Full probabilities in float64, with the key heads repeated."""
    q, k = q.double(), k.double()
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    logits = torch.einsum("bhmd,bhnd->bhmn", q, k)
    logits = logits * (q.shape[-1] ** -0.5 if scale is None else scale)
    if seen is not None:
        logits = logits.masked_fill(~seen, -torch.inf)
    return logits.softmax(-1).mean((1, 2))


def earlier(m: int, n: int) -> Tensor:
    """Which of n keys each of the last m queries sees, ``[M, N]``."""
    return torch.ones(m, n, dtype=torch.bool).tril(n - m)


def log_sums(q: Tensor, k: Tensor) -> Tensor:
    """Log-sum-exp of the logits of each query in float64, ``[B, H, M]``."""
    k = k.double().repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    return (q.double() @ k.mT * q.shape[-1] ** -0.5).logsumexp(-1)
