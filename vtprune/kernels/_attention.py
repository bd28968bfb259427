"""Mean attention probability per key in bounded memory, shared by the attention operations."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from vtprune.errors import ConfigError, InputError
from vtprune.kernels._common import check_dims, full_precision, widened

WIDEST = 128  # heads that kernels take


def check(q: Tensor, k: Tensor, chunk_bytes: int, op: str) -> None:
    """Raises InputError where queries and keys do not fit together; ConfigError for no memory."""
    check_dims(q, "B, H, M, d", op)
    check_dims(k, "B, Hkv, N, d", op)
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise InputError(
            f"{op}: q is {list(q.shape)} and k is {list(k.shape)}; batch and head width must match."
        )
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise InputError(
            f"{op}: {q.shape[1]} query heads cannot share {k.shape[1]} key heads; "
            "the first must be a multiple of the second."
        )
    if q.shape[2] == 0 or k.shape[2] == 0:
        raise InputError(f"{op}: {q.shape[2]} queries and {k.shape[2]} keys; give at least one.")
    if chunk_bytes < 1:
        raise ConfigError(f"{op}: chunk_bytes={chunk_bytes}; give a positive number of bytes.")


def factor(q: Tensor, scale: float | None) -> float:
    """Returns what logits are multiplied with."""
    return q.shape[3] ** -0.5 if scale is None else scale


def refused(q: Tensor, k: Tensor) -> str | None:
    """Says why kernels do not take these queries and keys."""
    if torch.float64 in (q.dtype, k.dtype):
        return "q or k is float64, which it would round"
    if q.dtype != k.dtype:
        return f"q is {q.dtype}, but k is {k.dtype}"
    if q.shape[3] > WIDEST:
        return f"heads are {q.shape[3]} wide, and it takes {WIDEST} at most"
    return None


def _sums(
    q: Tensor, k: Tensor, scale: float, seen: Tensor | None = None, lse: Tensor | None = None
) -> Tensor:
    """Returns probabilities summed over heads and queries: ``[b, H, m, d]`` -> ``[b, N]``."""
    b, h, m, d = q.shape
    shared = k.shape[1]
    rows = widened(q).reshape(b, shared, h // shared * m, d) * scale
    logits = rows @ widened(k).transpose(-1, -2)
    if seen is not None:
        logits.masked_fill_(~seen.repeat(h // shared, 1), -torch.inf)
    if lse is None:
        return logits.softmax(-1).sum((1, 2))
    return logits.sub_(lse.reshape(b, shared, -1, 1)).exp_().sum((1, 2))


def _parts(m: int, size: int) -> Iterator[slice]:
    return (slice(start, min(m, start + size)) for start in range(0, m, size))


@torch.no_grad()
def mean_probability(
    q: Tensor,
    k: Tensor,
    scale: float,
    chunk_bytes: int,
    seen: Tensor | None = None,
    causal: bool = False,
    lse: Tensor | None = None,
) -> Tensor:
    """Returns the attention probability of each key, mean over heads and queries.

    The batch is cut into groups of whole rows; only where one row alone exceeds the limit are its
    queries cut, so that a row's sums do not depend on the others of its batch.

    Args:
        q: ``[B, H, M, d]`` queries.
        k: ``[B, Hkv, N, d]`` keys, H a multiple of Hkv.
        scale: factor of the logits.
        chunk_bytes: most bytes of probabilities held at a time, down to one query of one row.
        seen: ``[M, N]`` bool, the keys that each query sees, at least one; None = all.
        causal: whether the last query sees all keys, the one before it all but the last, and so on.
        lse: ``[B, H, M]`` log-sum-exp of the logits of each query, where it is known.

    Returns:
        ``[B, N]`` float32.
    """
    _, heads, m, _ = q.shape
    n = k.shape[2]
    per_query = heads * n * widened(q[:0]).element_size()
    n_rows = max(1, chunk_bytes // (per_query * m))
    n_queries = max(1, min(m, chunk_bytes // per_query))
    key = torch.arange(n, device=q.device)
    sums = []
    with full_precision(q):
        for i in _parts(len(q), n_rows):
            total = None
            for at in _parts(m, n_queries):
                mask = None if seen is None else seen[at]
                if causal:
                    mask = key <= key[n - m :][at, None]
                known = None if lse is None else lse[i, :, at]
                part = _sums(q[i, :, at], k[i], scale, mask, known)
                total = part if total is None else total.add_(part)
            sums.append(total)
    return (torch.cat(sums) / (heads * m)).float()
