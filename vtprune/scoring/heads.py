"""Heads, values and bits that attention can do without: what SpAtten leaves out of it.

arXiv 2012.09852. B images, H heads, S tokens, d width of a head.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vtprune.scoring.connectivity import among_highest


def n_left(share: float, heads: int) -> int:
    """Returns how many of ``heads`` a share of them is, at least 1."""
    return max(1, math.ceil(share * heads - 1e-6))


def important(total: Tensor, alive: Tensor, k: int) -> Tensor:
    """Returns the ``k`` heads of each image that gave most so far, ``[B, H]`` bool.

    Args:
        total: ``[B, H]``, what each gave; alive: ``[B, H]`` bool, those not left out before.
    """
    return among_highest(total.masked_fill(~alive, -torch.inf), k) & alive


def given_by(out: Tensor, real: Tensor | None) -> Tensor:
    """Returns what each head gave, the sum of absolute values: ``[B, H]`` float32.

    Args:
        out: ``[B, H, S, d]``; real: ``[B, S]`` bool, which tokens are no padding, None = all.
    """
    sizes = out.detach().float().abs().sum(-1)
    return (sizes if real is None else sizes.masked_fill(~real[:, None], 0.0)).sum(-1)


def rounded(x: Tensor, bits: int, more: int) -> tuple[Tensor, Tensor]:
    """Returns ``x`` ``[B, H, S, d]`` in its first ``bits``, and in all ``bits + more``.

    Steps are equal from the largest value to its negative, for each image and head. Leaving out
    the last bits rounds down.
    """
    most = 2 ** (bits + more - 1) - 1
    step = x.float().abs().amax((2, 3), keepdim=True).clamp(min=1e-30) / most
    whole = (x.float() / step).round()
    coarse = torch.floor(whole / 2**more) * 2**more
    return coarse * step, whole * step


def progressive(q: Tensor, k: Tensor, bits: tuple[int, int], flat: float, bias: Tensor) -> Tensor:
    """Returns attention by few bits, and by more where these say too little.

    Args:
        q, k: ``[B, H, S, d]``; bias: what products get added, that can be broadcast to them.
        bits: those that are read first, and those that are read too for a query that gives no key
            a share of at least ``flat``.

    Returns:
        ``[B, H, S, S]`` float32.
    """
    few, all_ = zip(rounded(q, *bits), rounded(k, *bits), strict=True)
    scale = q.shape[-1] ** -0.5
    first, second = ((a @ b.mT * scale + bias).softmax(-1) for a, b in (few, all_))
    return torch.where(first.amax(-1, keepdim=True) < flat, second, first)
