"""Tokens that are merged by several criteria, from both halves of a sequence into the other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vtprune.kernels._common import full_precision
from vtprune.scoring.diversity import ONE, outside, unit
from vtprune.scoring.matching import averaged, closest, goes_into, halves

TINY = 1e-30  # what no attention and no likeness count as, so that they have a logarithm


@dataclass(frozen=True)
class Temperatures:
    """How little each criterion counts: its power is 1 by this. Below, each above 0.

    Attributes:
        likeness: of two tokens; attention: that they receive, little of it being good; size: how
            many patches they stand for, few being good.
    """

    likeness: float = 1.0
    attention: float = 20.0
    size: float = 40.0


@dataclass(frozen=True)
class Traits:
    """What matters of tokens when they merge.

    Attributes:
        tokens: ``[B, N, D]``, whose cosine is their likeness.
        received: ``[B, N]`` attention, at least 0; any scale.
        size: ``[B, N]`` float32, above 0.
        weight: ``[B, N]`` float32, above 0, of each token in a mean.
    """

    tokens: Tensor
    received: Tensor
    size: Tensor
    weight: Tensor


def affinity(traits: Traits, even: Tensor, odd: Tensor, by: Temperatures) -> Tensor:
    """Returns how good it is to merge two tokens, as a logarithm up to a constant: ``[B, E, O]``.

    Of tokens with NaN or inf it is -inf.

    Args:
        even, odd: ``[E]`` and ``[O]`` int64, the tokens of each half.
    """
    x, broken = unit(traits.tokens)
    broken = broken | ~traits.received.isfinite()
    with full_precision(x):
        cosine = x[:, even] @ x[:, odd].mT
    received = traits.received.float().nan_to_num(0.0, 0.0, 0.0).clamp(min=TINY)
    alone = -received.log() / by.attention - traits.size.log() / by.size  # [B, N]
    alone = alone.masked_fill(broken, -torch.inf)
    cosine = cosine.masked_fill(cosine > ONE, 1.0)
    likeness = ((cosine + 1) / 2).clamp(min=TINY).log() / by.likeness
    return likeness + alone[:, even, None] + alone[:, None, odd]


def match_both_ways(
    traits: Traits, r: int, n_prefix: int, by: Temperatures, both: bool = True
) -> tuple[Tensor, Tensor]:
    """Puts tokens at even places into odd ones, and then as many odd ones into what is left there.

    Args:
        r: how many, up to N // 2: r // 2 of them from even places.
        n_prefix: tokens before the first, which take places but no part.
        both: or else all of them from even places.

    Returns:
        The tokens that are left, ``[B, N - r]`` int64, those at even places before those at odd
        ones; and which of these outputs each token goes into, ``[B, N]`` int64.
    """
    batch, n, device = *traits.tokens.shape[:2], traits.tokens.device
    even, odd = halves(n, n_prefix, device)
    good = affinity(traits, even, odd, by)
    source, partner = closest(good, r // 2 if both else r)
    stays = outside(source, len(even))
    if not both:
        rows = torch.cat([even[stays], odd.expand(batch, -1)], dim=1)
        return rows, goes_into(rows, even[source], odd[partner], n)
    into = torch.arange(n, device=device).expand(batch, n).scatter(1, even[source], odd[partner])
    back = good.gather(1, stays[..., None].expand(-1, -1, len(odd))).mT
    source, partner = closest(back, r - r // 2)
    rows = torch.cat([even[stays], odd[outside(source, len(odd))]], dim=1)
    goes = goes_into(rows, odd[source], even[stays].gather(1, partner), n)
    return rows, goes.gather(1, into)


def merge_both_ways(
    traits: Traits, k: int, n_prefix: int, by: Temperatures, both: bool = True
) -> tuple[Tensor, Tensor]:
    """Matches tokens until ``k`` are left, from 1 to N - 1.

    Where more than half are to leave, what is left is matched again, as what it was merged to.

    Returns:
        As ``match_both_ways``: ``[B, k]`` and ``[B, N]``.
    """
    n = traits.tokens.shape[1]
    rows = into = torch.arange(n, device=traits.tokens.device).expand_as(traits.size)
    while (n := traits.tokens.shape[1]) > k:
        left, goes = match_both_ways(traits, min(n - k, n // 2), n_prefix, by, both)
        step = averaged(left, goes, traits.weight)
        traits = Traits(
            step.apply(traits.tokens.float()),
            step.total(traits.received),
            step.total(traits.size),
            step.total(traits.weight),
        )
        rows, into = rows.gather(1, left), goes.gather(1, into)
    return rows, into
