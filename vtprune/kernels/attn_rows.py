"""Attention of a few query rows to every key, without the rest of the attention matrix."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from vtprune.errors import InputError
from vtprune.kernels._attention import check, factor, mean_probability, refused
from vtprune.kernels._common import MIB
from vtprune.kernels._dispatch import launch, run


@torch.no_grad()
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
        chunk_bytes: most bytes of probabilities that torch holds at a time; a kernel holds none.

    Returns:
        ``[B, N]`` float32; each row sums to 1.

    Raises:
        InputError: shapes that do not fit together.
    """
    check(q, k, chunk_bytes, "attn_rows")
    if seen is not None and tuple(seen.shape) != (q.shape[2], k.shape[2]):
        raise InputError(
            f"attn_rows: seen is {list(seen.shape)}, but there are {q.shape[2]} queries and "
            f"{k.shape[2]} keys."
        )
    reference = partial(_reference, chunk_bytes)
    return run("attn_rows", reference, _kernel, refused(q, k), q, k, factor(q, scale), seen)


def _reference(chunk_bytes: int, q: Tensor, k: Tensor, scale: float, seen: Tensor | None) -> Tensor:
    return mean_probability(q, k, scale, chunk_bytes, seen)


@torch.library.custom_op("vtprune::attn_rows", mutates_args=())
def _kernel(q: Tensor, k: Tensor, scale: float, seen: Tensor | None) -> Tensor:
    return launch("attn_rows", q, k, scale, seen)


@_kernel.register_fake
def _(q: Tensor, k: Tensor, scale: float, seen: Tensor | None) -> Tensor:
    return q.new_empty((len(q), k.shape[2]), dtype=torch.float32)
