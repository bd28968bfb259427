"""The end of a ranking: what is not worth a place is merged into what is most like it."""

from __future__ import annotations

import torch
from torch import Tensor

from vtprune.kernels._common import full_precision
from vtprune.kernels.gather_tokens import gather_tokens
from vtprune.scoring.diversity import ONE, unit
from vtprune.selection import Mix, Selection

LEAST = 1e-3  # what a token counts for at least: attention takes the logarithm


def merge_tail(order: Tensor, k: int, pruned: int, tokens: Tensor, size: Tensor) -> Selection:
    """Keeps the first ``k``, drops the last, and puts those between into the most similar ones.

    An output is the plain mean of its tokens. It counts for what the kept one counted for, and for
    the others times their cosine with it; tokens with NaN or inf resemble none.

    Args:
        order: ``[B, N]`` int64, from the first to the last; ``pruned``: how many are dropped, up to
            N - k.
        tokens: ``[B, N, D]``, which the cosine compares; size: ``[B, N]`` float32, above 0.
    """
    n = tokens.shape[1]
    kept, tail = order[:, :k].sort(dim=1).values, order[:, k : n - pruned]
    if not tail.shape[1]:
        return Selection(kept, n)
    x, broken = unit(tokens)
    ends, starts = gather_tokens(tail, x)[0], gather_tokens(kept, x)[0]
    with full_precision(x):
        cosine = ends @ starts.mT  # [B, tail, k]
    cosine = cosine.masked_fill(cosine > ONE, 1.0)
    hidden = broken.gather(1, tail)[:, :, None] | broken.gather(1, kept)[:, None]
    best, owner = cosine.masked_fill(hidden, -2.0).max(-1)
    place = torch.arange(k, device=order.device).expand_as(kept)
    source, target = torch.cat([kept, tail], dim=1), torch.cat([place, owner], dim=1)
    worth = torch.cat([torch.ones_like(kept, dtype=size.dtype), best.clamp(min=-1.0)], dim=1)
    count = size.new_zeros(kept.shape).scatter_add_(1, target, torch.ones_like(worth))
    sizes = torch.zeros_like(count).scatter_add_(1, target, worth * size.gather(1, source))
    mix = Mix(source, target, 1 / count.gather(1, target))
    return Selection(kept, n, mix, sizes.clamp(min=LEAST))
