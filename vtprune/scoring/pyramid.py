"""Pyramid sparse attention: which blocks of keys a block of queries sees, and how coarsely.

A prefill's keys are looked at whole where they matter, as means of 2, 4 or 8 where they matter less
and not at all where they do not. ziplab/Pyramid-Sparse-Attention. B prompts, H heads, L tokens,
n blocks, d head width. A level is how many keys are one; 0 = the block is not seen.
``kernels/psa_attention.py`` attends by them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

Bounds = Mapping[int, tuple[float, float]]
# Level by the share of a row's importance that blocks up to this one have: above, up to.
QWEN: Bounds = {1: (0.0, 0.7), 2: (0.7, 0.8), 4: (0.8, 0.9), 8: (0.9, 0.9)}
ALIKE = {2: 0.75, 4: 0.7, 8: 0.7}  # cosine above which keys may be one


def importance(q: Tensor, k: Tensor, block: int, stride: int) -> Tensor:
    """Returns how much each block of queries attends to each of keys, ``[B, H, n, n]`` float32.

    Told by the antidiagonals of squares of ``stride`` queries and keys. Rows sum to
    ``block / stride``, a shorter last one to its share.

    Args:
        q, k: ``[B, H, L, d]`` after position encoding, of one prompt from its start.
        block: tokens per block, a multiple of ``stride``.
    """
    length, width = q.shape[-2:]
    turned = _grouped(q, stride, length).flip(-2).flatten(-2)
    groups = _grouped(k, stride, length).flatten(-2)
    logits = turned @ groups.mT / (width**0.5 * stride)
    place = torch.arange(logits.shape[-1], device=q.device)
    weights = logits.masked_fill(place > place[:, None], -torch.inf).softmax(-1)
    per_block = block // stride
    more = -logits.shape[-1] % per_block
    weights = F.pad(weights, (0, more, 0, more))
    return weights.unflatten(-1, (-1, per_block)).unflatten(-3, (-1, per_block)).sum((-1, -3))


def levels_of(weights: Tensor, bounds: Bounds = QWEN, text_blocks: int = 0) -> Tensor:
    """Returns the level of each pair of blocks, before what the keys allow, ``[B, H, n, n]`` int64.

    The first block of keys, each block's own and those of the text at the end are seen whole.

    Args:
        weights: see ``importance``; bounds: see ``QWEN``; text_blocks: how many at the end.
    """
    n = weights.shape[-1]
    order = weights.sort(dim=-1, descending=True, stable=True)
    so_far = order.values.cumsum(-1) / order.values.sum(-1, keepdim=True)
    ranked = torch.zeros_like(order.indices)
    for level, (above, up_to) in bounds.items():
        ranked = torch.where((so_far > above) & (so_far <= up_to), level, ranked)
    levels = torch.zeros_like(ranked).scatter(-1, order.indices, ranked)
    place = torch.arange(n, device=weights.device)
    text = place >= n - text_blocks
    whole = text | text[:, None] | (place == 0) | (place == place[:, None])
    levels = levels.masked_fill(whole, 1)
    return levels.masked_fill(place > place[:, None], 0)


def coarsest(k: Tensor, block: int, alike: Mapping[int, float] = ALIKE) -> Tensor:
    """Returns the highest level at which keys that would be one are alike, ``[B, H, n]`` int64.

    Args:
        k: ``[B, H, L, d]``; alike: by level the mean cosine that its keys' ends must exceed.
    """
    blocks = F.normalize(_whole_blocks(k, block), dim=-1).unflatten(-2, (-1, block))
    found = torch.ones(blocks.shape[:-2], dtype=torch.int64, device=k.device)
    for level, least in sorted(alike.items()):
        ends = (blocks[..., ::level, :] * blocks[..., level - 1 :: level, :]).sum(-1)
        found = torch.where(ends.mean(-1) > least, level, found)
    return found


def density(levels: Tensor) -> Tensor:
    """Returns what share of causal attention is computed: the mean over seen pairs of 1 / level."""
    n = levels.shape[-1]
    pairs = levels[..., *torch.tril_indices(n, n, device=levels.device)].float()
    return torch.where(pairs > 0, 1 / pairs.clamp(min=1), 0.0).mean()


def _whole_blocks(x: Tensor, block: int) -> Tensor:
    """Returns ``[..., n * block, d]`` float32, the last token repeated to the end of its block."""
    last = x[..., -1:, :].expand(*x.shape[:-2], -x.shape[-2] % block, -1)
    return torch.cat([x, last], dim=-2).float()


def _grouped(x: Tensor, stride: int, length: int) -> Tensor:
    """Returns ``[B, H, L / stride, stride, d]`` float32, zeros after the end."""
    return F.pad(x.float(), (0, 0, 0, -length % stride)).unflatten(-2, (-1, stride))
