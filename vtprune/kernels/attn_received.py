"""Attention that each key receives from all queries, without an N x N matrix."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from vtprune.errors import InputError
from vtprune.kernels._attention import check, factor, mean_probability, refused
from vtprune.kernels._common import MIB
from vtprune.kernels._dispatch import launch, run

OP = "attn_received"


@torch.no_grad()
def attn_received(
    q: Tensor,
    k: Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    lse: Tensor | None = None,
    lengths: Sequence[int] | None = None,
    chunk_bytes: int = 256 * MIB,
) -> Tensor:
    """Returns the attention each key receives, mean over heads and over all queries.

    The softmax runs in float32 over all keys that a query sees. Not differentiable.

    Args:
        q: ``[B, H, M, d]`` all queries.
        k: ``[B, Hkv, N, d]`` all keys; H a multiple of Hkv (grouped heads are not repeated).
        scale: factor of the logits; None = ``d ** -0.5``.
        causal: whether the last query sees all keys, the one before it all but the last, and so on.
        lse: ``[B, H, M]`` natural logarithm of the sum of the exponentials of each query's logits,
            where attention has already computed it.
        lengths: of the sequences that the one row of the batch is packed of; each attends to itself
            alone, and its mean is over its own queries.
        chunk_bytes: most bytes of probabilities that torch holds at a time, and takes queries in
            chunks for; a kernel holds none.

    Returns:
        ``[B, N]`` float32; each row, or each sequence of a packed one, sums to 1.

    Raises:
        InputError: shapes that do not fit together.
    """
    check(q, k, chunk_bytes, OP)
    (b, heads, m, _), n = q.shape, k.shape[2]
    if causal and m > n:
        raise InputError(f"{OP}: causal, but of {m} queries only the last {n} see one of {n} keys.")
    if lse is not None and tuple(lse.shape) != (b, heads, m):
        raise InputError(f"{OP}: lse is {list(lse.shape)}; give {[b, heads, m]}.")
    if lengths is not None:
        lengths = list(lengths)
        if b != 1 or m != n or sum(lengths) != n or min(lengths) < 1:
            raise InputError(
                f"{OP}: lengths={lengths}, but q is {list(q.shape)} and k is {list(k.shape)}; give "
                "one row of as many queries as keys, and positive lengths that sum to them."
            )
    reference = partial(_reference, chunk_bytes)
    why = refused(q, k)
    return run(OP, reference, _kernel, why, q, k, factor(q, scale), causal, lse, lengths)


def _reference(
    chunk_bytes: int,
    q: Tensor,
    k: Tensor,
    scale: float,
    causal: bool,
    lse: Tensor | None,
    lengths: list[int] | None,
) -> Tensor:
    if lengths is None:
        return mean_probability(q, k, scale, chunk_bytes, None, causal, lse)
    known = [None] * len(lengths) if lse is None else lse.split(lengths, 2)
    pieces = zip(q.split(lengths, 2), k.split(lengths, 2), known, strict=True)
    return torch.cat(
        [mean_probability(x, y, scale, chunk_bytes, None, causal, z) for x, y, z in pieces], 1
    )


@torch.library.custom_op("vtprune::attn_received", mutates_args=())
def _kernel(
    q: Tensor,
    k: Tensor,
    scale: float,
    causal: bool,
    lse: Tensor | None,
    lengths: list[int] | None,
) -> Tensor:
    return launch("attn_received", q, k, scale, causal, lse, lengths)


@_kernel.register_fake
def _(
    q: Tensor,
    k: Tensor,
    scale: float,
    causal: bool,
    lse: Tensor | None,
    lengths: list[int] | None,
) -> Tensor:
    return q.new_empty((len(q), k.shape[2]), dtype=torch.float32)
