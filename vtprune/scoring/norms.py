"""Merged tokens that keep the norm of what they are made of."""

from __future__ import annotations

import torch
from torch import Tensor

from vtprune.kernels._common import widened
from vtprune.selection import Mix, Selection


def norm_preserving(rows: Tensor, into: Tensor, x: Tensor, by_place: bool = False) -> Selection:
    """Makes each output the plain mean of its tokens, as long as the longest of them.

    What has no direction, or one with NaN or inf, stays the plain mean.

    Args:
        rows: ``[B, K]`` int64, the place of each output; into: ``[B, N]`` int64, the output that
            each token goes into; x: ``[B, N, D]``.
        by_place: the mean is divided by the norm of the token at the output's place, not by its
            own.
    """
    x = widened(x)
    source = torch.arange(x.shape[1], device=x.device).expand_as(into)
    count = torch.zeros(rows.shape, device=x.device)
    count = count.scatter_add_(1, into, torch.ones(into.shape, device=x.device))
    share = 1 / count.gather(1, into)
    norm = x.norm(dim=-1)  # [B, N]
    longest = norm.new_zeros(rows.shape).scatter_reduce(1, into, norm, "amax")
    mean = Selection(rows, x.shape[1], Mix(source, into, share)).apply(x)
    own = norm.gather(1, rows) if by_place else mean.norm(dim=-1)
    scale = (longest / own).float()
    scale = scale.masked_fill((count == 1) | ~scale.isfinite(), 1.0)
    return Selection(rows, x.shape[1], Mix(source, into, share * scale.gather(1, into)))
