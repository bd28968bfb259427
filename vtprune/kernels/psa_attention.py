"""Causal attention over blocks of keys that are seen whole, as means of a few, or not at all."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vtprune.errors import ConfigError, InputError
from vtprune.kernels import _attention
from vtprune.kernels._common import check_dims, full_precision, widened
from vtprune.kernels._dispatch import launch, learns, run

OP = "psa_attention"
LEVELS = (1, 2, 4, 8)  # how many keys are one; 0 = the block is not seen


def psa_attention(
    q: Tensor, k: Tensor, v: Tensor, levels: Tensor, block: int, scale: float | None = None
) -> Tensor:
    """Returns causal attention in which keys and values of a block are means of so many.

    A mean counts for all that it is made of, and is seen by the queries after the last of them.
    Pyramid Sparse Attention, ziplab/Pyramid-Sparse-Attention; with levels 0 and 1 alone it is any
    attention that leaves out blocks. Nothing after a query matters to it, so that rows of a batch
    may end in padding. Softmax and sums run in float32. Differentiable in torch, not as a kernel,
    which ``auto`` does not take where gradients are wanted.

    Args:
        q: ``[B, H, N, d]`` all queries of prompts from their start, after position encoding.
        k, v: ``[B, Hkv, N, d]``, H a multiple of Hkv (grouped heads are not repeated).
        levels: ``[B, H, n, n]`` integers, block of queries by block of keys, n = N / block rounded
            up: 0 or one of ``LEVELS``; bool = 0 and 1. What is above the diagonal, or none of these
            numbers, is not seen.
        block: tokens per block, a multiple of 8.
        scale: factor of the logits; None = ``d ** -0.5``.

    Returns:
        ``[B, H, N, d]`` in the dtype of ``v``; 0 for a query that sees nothing.

    Raises:
        ConfigError: another block.
        InputError: shapes that do not fit together.
    """
    _check(q, k, v, levels, block)
    factor = _attention.factor(q, scale)
    return run(OP, _reference, _kernel, _refused(q, k, v), q, k, v, levels, block, factor)


def pyramid(x: Tensor, block: int) -> Tensor:
    """Returns the means of each of ``LEVELS``, one after the other: ``[B, H, 15 / 8 n block, d]``.

    The last token is repeated to the end of its block. Level l starts at row
    ``2 n block (1 - 1 / l)``.

    Args:
        x: ``[B, H, N, d]``, float32 or float64.
    """
    last = x[..., -1:, :].expand(*x.shape[:-2], -x.shape[-2] % block, -1)
    means = [torch.cat([x, last], dim=-2)]
    for _ in LEVELS[1:]:
        means.append(means[-1].unflatten(-2, (-1, 2)).mean(-2))
    return torch.cat(means, dim=-2)


def _check(q: Tensor, k: Tensor, v: Tensor, levels: Tensor, block: int) -> None:
    if isinstance(block, bool) or not isinstance(block, int) or block < 1 or block % LEVELS[-1]:
        raise ConfigError(f"{OP}: block={block!r}; give a positive multiple of {LEVELS[-1]}.")
    _attention.check(q, k, 1, OP)
    check_dims(v, "B, Hkv, N, d", OP)
    if q.shape[2] != k.shape[2] or k.shape != v.shape:
        raise InputError(
            f"{OP}: q is {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)}; give as many "
            "queries as keys, and values of the shape of the keys."
        )
    n = -(-q.shape[2] // block)
    if tuple(levels.shape) != (*q.shape[:2], n, n) or levels.is_floating_point():
        raise InputError(
            f"{OP}: levels are {list(levels.shape)} {levels.dtype}; for {q.shape[2]} tokens in "
            f"blocks of {block} give integers {[*q.shape[:2], n, n]}."
        )


def _refused(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Says why the kernel does not take these tensors."""
    if learns(q, k, v):
        return "gradients are wanted, and it has none"
    if v.dtype != k.dtype:
        return f"v is {v.dtype}, but k is {k.dtype}"
    return _attention.refused(q, k)


def _reference(q: Tensor, k: Tensor, v: Tensor, levels: Tensor, block: int, scale: float) -> Tensor:
    """One block of queries at a time; query heads of shared keys one behind the other."""
    length, shared = q.shape[2], k.shape[1]
    levels = levels.unflatten(1, (shared, -1))
    grouped = widened(q).unflatten(1, (shared, -1)) * scale
    rows = []
    with full_precision(q):
        keys, values = (pyramid(widened(x), block) for x in (k, v))
        for number, first in enumerate(range(0, length, block)):
            queries, own = grouped[..., first : first + block, :], levels[..., number, :]
            at, there, more = _seen(own, number, block, queries.shape[-2])
            logits = queries.flatten(2, 3) @ keys[:, :, at].mT
            logits = (logits.unflatten(2, queries.shape[2:4]) + more).masked_fill(
                ~there, -torch.inf
            )
            weights = logits.softmax(-1).masked_fill(~there, 0.0)  # NaN where nothing is seen
            found = weights.flatten(2, 3) @ values[:, :, at]
            rows.append(found.unflatten(2, queries.shape[2:4]))
    return torch.cat(rows, dim=-2).flatten(1, 2).to(v.dtype)


def _seen(own: Tensor, number: int, block: int, n_queries: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns which rows of the pyramid may matter to a block of queries.

    Args:
        own: ``[..., n]`` its levels; number: of the block.

    Returns:
        ``[S]`` rows up to the end of the block; ``[..., n_queries, S]`` bool, whether a query sees
        them; ``[S]`` the logarithms of how many keys they are.
    """
    whole, end = own.shape[-1] * block, (number + 1) * block
    place = number * block + torch.arange(n_queries, device=own.device)
    at, there, more = [], [], []
    for level in LEVELS:
        row = torch.arange(end // level, device=own.device)
        taken = (own[..., : number + 1] == level).repeat_interleave(block // level, dim=-1)
        at.append(row + 2 * (whole - whole // level))
        there.append(taken[..., None, :] & ((row + 1) * level <= place[:, None] + 1))
        more.append(torch.full_like(row, math.log(level), dtype=torch.float32))
    return torch.cat(at), torch.cat(there, dim=-1), torch.cat(more)


@torch.library.custom_op("vtprune::psa_attention", mutates_args=())
def _kernel(q: Tensor, k: Tensor, v: Tensor, levels: Tensor, block: int, scale: float) -> Tensor:
    return launch(OP, q, k, v, levels, block, scale)


@_kernel.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, levels: Tensor, block: int, scale: float) -> Tensor:
    return q.new_empty(q.shape, dtype=v.dtype)
