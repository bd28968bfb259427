"""FlexPrefill: which blocks of keys each head needs, told by its last block of queries.

A head looks at few columns and few distances, or where its queries ask it to; which of the two is
told by whether means of keys explain what the last queries attend to. arXiv 2502.20766,
bytedance/FlexPrefill. B prompts, H heads, L tokens, n blocks, d head width.
``kernels/psa_attention.py`` attends to the blocks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def blocks_seen(
    q: Tensor, k: Tensor, block: int = 128, gamma: float = 0.9, tau: float = 0.1, least: int = 4
) -> Tensor:
    """Returns which blocks of keys each block of queries sees, ``[B, H, n, n]`` bool.

    Each block's own and the first of the keys are always among them. A prompt of two blocks, or of
    ``least``, sees all.

    Args:
        q: ``[B, H, L, d]``, k: ``[B, Hkv, L, d]``, after position encoding, of prompts of one
            length from their start; H a multiple of Hkv.
        block: tokens per block.
        gamma: share of attention that what is seen has to cover, 0 to 1.
        tau: distance, 0 to 1, below which means of keys explain what the last queries attend to.
        least: columns and distances that a head sees at least, in blocks.
    """
    length = q.shape[2]
    n = -(-length // block)
    place = torch.arange(n, device=q.device)
    apart = place[:, None] - place
    earlier = apart >= 0
    if length <= block * max(2, least):
        return earlier.expand(*q.shape[:2], -1, -1)
    weights = last_attention(q, k, block)
    columns, distances = weights.mean(-2), by_distance(weights)
    n_columns, n_distances = (
        (_cover(x, gamma) // block + 1).clamp(least, n) for x in (columns, distances)
    )
    columns, distances = _per_block(columns, block), _per_block(distances.flip(-1), block).flip(-1)
    means = _means(k, block).repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    asks = _asks(q, means, columns, block) < tau
    n_columns, n_distances = (x.masked_fill(asks, least) for x in (n_columns, n_distances))
    column, distance = _highest(columns, n_columns), _highest(distances, n_distances)
    seen = column[..., None, :] | distance[..., apart.clamp(min=0)]
    asked = covering(_means(q, block) @ means.mT * q.shape[-1] ** -0.5, gamma)
    return (seen | (asked & asks[..., None, None])) & earlier


def last_attention(q: Tensor, k: Tensor, n_queries: int) -> Tensor:
    """Returns the attention of the last queries to all keys, ``[B, H, n_queries, L]`` float32."""
    length, shared = q.shape[2], k.shape[1]
    last = q[:, :, -n_queries:].float().unflatten(1, (shared, -1))
    logits = last.flatten(2, 3) @ k.float().mT * q.shape[-1] ** -0.5
    logits = logits.unflatten(2, last.shape[2:4]).flatten(1, 2)
    place = torch.arange(length, device=q.device)
    return logits.masked_fill(place > place[-n_queries:, None], -torch.inf).softmax(-1)


def by_distance(weights: Tensor) -> Tensor:
    """Returns the mean attention to the key so many tokens before, ``[..., L]``, from 0.

    Args:
        weights: ``[..., M, L]``, of the last M queries, 0 for later keys.
    """
    m, length = weights.shape[-2:]
    # Keys from the last on; in a row that is one shorter than it was, diagonals stand in columns.
    turned = F.pad(weights.flip(-1), (0, m)).flatten(-2)[..., m - 1 : -1]
    return turned.unflatten(-1, (m, -1))[..., :length].mean(-2)


def covering(logits: Tensor, gamma: float) -> Tensor:
    """Returns the blocks that have ``gamma`` of all attention, highest first, ``[..., n, n]`` bool.

    The one that would exceed the share is not among them. Rows are not alike: a row that attends
    to a few blocks has them before another that attends to many.

    Args:
        logits: ``[..., n, n]`` of blocks of queries and of keys; later keys are not seen.
    """
    n = logits.shape[-1]
    place = torch.arange(n, device=logits.device)
    weights = logits.masked_fill(place > place[:, None], -torch.inf).softmax(-1).flatten(-2)
    order = weights.sort(dim=-1, descending=True, stable=True)
    within = order.values.cumsum(-1) <= gamma * n
    return torch.zeros_like(within).scatter(-1, order.indices, within).unflatten(-1, (n, n))


def _asks(q: Tensor, means: Tensor, columns: Tensor, block: int) -> Tensor:
    """Returns how far the attention to means of keys is from the attention to their blocks.

    The square root of the Jensen-Shannon divergence, ``[B, H]``, of the last queries' mean.
    """
    last = q[:, :, None, -block:].float().mean(-2)
    guess = (last @ means.mT * q.shape[-1] ** -0.5).softmax(-1).squeeze(-2)
    middle = (guess + columns) / 2
    apart = sum(torch.xlogy(x, x / middle).sum(-1) / 2 for x in (guess, columns))
    return torch.as_tensor(apart).clamp(min=0).sqrt()


def _cover(x: Tensor, gamma: float) -> Tensor:
    """Returns how many of the highest values it takes to exceed ``gamma``."""
    return (x.sort(dim=-1, descending=True).values.cumsum(-1) <= gamma).sum(-1) + 1


def _highest(x: Tensor, count: Tensor) -> Tensor:
    """Returns which are the first and the ``count`` highest of all, ``[..., n]`` bool."""
    x = torch.cat([torch.full_like(x[..., :1], torch.inf), x[..., 1:]], dim=-1)
    return x.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1) < count[..., None]


def _per_block(x: Tensor, block: int) -> Tensor:
    return F.pad(x, (0, -x.shape[-1] % block)).unflatten(-1, (-1, block)).sum(-1)


def _means(x: Tensor, block: int) -> Tensor:
    """Returns the means of blocks of tokens, ``[..., n, d]`` float32."""
    return torch.stack([part.float().mean(-2) for part in x.split(block, dim=-2)], dim=-2)
