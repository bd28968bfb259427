"""Inputs shared by the tests of the operations."""

from __future__ import annotations

import itertools
import math

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


def naive_pyramid(
    q: Tensor, k: Tensor, v: Tensor, levels: Tensor, block: int, scale: float | None = None
) -> Tensor:
    """Attention to means of keys, a query at a time in float64, with the key heads repeated."""
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    shared_by = q.shape[1] // k.shape[1]
    q, k, v = (x.double().cpu() for x in (q, k, v))
    out = torch.zeros_like(q)
    for row, head, at in itertools.product(*map(range, q.shape[:3])):
        logits, values = [], []
        for number in range(at // block + 1):
            level = int(levels[row, head, at // block, number])
            for first in range(number * block, (number + 1) * block, max(1, level)):
                if level and first + level <= at + 1:
                    mine = row, head // shared_by, slice(first, first + level)
                    logits.append(q[row, head, at] @ k[mine].mean(0) * factor + math.log(level))
                    values.append(v[mine].mean(0))
        if logits:
            out[row, head, at] = torch.stack(logits).softmax(0) @ torch.stack(values)
    return out


def drawn_levels(*shape: int, seed: int = 0, whole: bool = True) -> Tensor:
    """Levels of blocks ``[B, H, n, n]`` at random; the diagonal 1 where ``whole``."""
    generator = torch.Generator().manual_seed(seed)
    levels = torch.tensor([0, 1, 2, 4, 8])[torch.randint(0, 5, shape, generator=generator)]
    if whole:
        levels.diagonal(dim1=-2, dim2=-1).fill_(1)
    return levels
