"""Mean attention probability per key in bounded memory, shared by the attention operations."""

from __future__ import annotations

import torch
from torch import Tensor

from vtprune.errors import ConfigError, InputError
from vtprune.kernels._common import check_dims, full_precision, widened


def _check(q: Tensor, k: Tensor, seen: Tensor | None, chunk_bytes: int, op: str) -> None:
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
    if seen is not None and tuple(seen.shape) != (q.shape[2], k.shape[2]):
        raise InputError(
            f"{op}: seen is {list(seen.shape)}, but there are {q.shape[2]} queries and "
            f"{k.shape[2]} keys."
        )
    if chunk_bytes < 1:
        raise ConfigError(f"{op}: chunk_bytes={chunk_bytes}; give a positive number of bytes.")


def _sums(q: Tensor, k: Tensor, scale: float, seen: Tensor | None) -> Tensor:
    """Returns probabilities summed over heads and queries: ``[b, H, m, d]`` -> ``[b, N]``."""
    b, h, m, d = q.shape
    shared = k.shape[1]
    rows = widened(q).reshape(b, shared, h // shared * m, d) * scale
    logits = rows @ widened(k).transpose(-1, -2)
    if seen is not None:
        logits.masked_fill_(~seen.repeat(h // shared, 1), -torch.inf)
    return logits.softmax(-1).sum((1, 2))


@torch.no_grad()
def mean_probability(
    q: Tensor,
    k: Tensor,
    scale: float | None,
    chunk_bytes: int,
    op: str,
    seen: Tensor | None = None,
) -> Tensor:
    """Returns the attention probability of each key, mean over heads and queries.

    The batch is cut into groups of whole rows; only where one row alone exceeds the limit are its
    queries cut, so that a row's sums do not depend on the others of its batch.

    Args:
        q: ``[B, H, M, d]`` queries.
        k: ``[B, Hkv, N, d]`` keys, H a multiple of Hkv.
        scale: factor of the logits; None = ``d ** -0.5``.
        chunk_bytes: most bytes of probabilities held at a time, down to one query of one row.
        op: name for messages.
        seen: ``[M, N]`` bool, the keys that each query sees, at least one; None = all.

    Returns:
        ``[B, N]`` float32.
    """
    _check(q, k, seen, chunk_bytes, op)
    _, heads, m, d = q.shape
    n = k.shape[2]
    factor = d**-0.5 if scale is None else scale
    per_query = heads * n * widened(q[:0]).element_size()
    n_rows = max(1, chunk_bytes // (per_query * m))
    n_queries = max(1, min(m, chunk_bytes // per_query))
    sums = []
    with full_precision(q):
        for queries, keys in zip(q.split(n_rows), k.split(n_rows), strict=True):
            parts = queries.split(n_queries, dim=2)
            masks = [None] * len(parts) if seen is None else seen.split(n_queries)
            first, *rest = zip(parts, masks, strict=True)
            total = _sums(first[0], keys, factor, first[1])
            for part, mask in rest:
                total += _sums(part, keys, factor, mask)
            sums.append(total)
    return (torch.cat(sums) / (heads * m)).float()
