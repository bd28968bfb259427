"""Which tokens matter to a few probes of a prompt: how many hold their attention, and which.

n tokens of one prompt without padding, M of them probes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vtprune.errors import ConfigError, InputError
from vtprune.kernels.attn_rows import attn_rows
from vtprune.kernels.topk_sorted import ranked


def probes(n: int, recent: int = 64, chance: int = 64, seed: int = 0) -> Tensor:
    """Returns which of ``n`` tokens are probes, ``[M]`` int64, ascending: all where too few.

    The last ``recent`` ones, and ``chance`` of those before, drawn by ``seed`` alone: the same on
    every device and in every call.

    Raises:
        ConfigError: numbers that are no counts.
    """
    if n < 1 or recent < 1 or chance < 0:
        raise ConfigError(
            f"n={n}, recent={recent}, chance={chance}: give at least 1 token, 1 recent probe, and "
            "0 or more by chance."
        )
    before = max(0, n - recent)
    chosen = torch.Generator("cpu").manual_seed(seed)
    drawn = torch.randperm(before, generator=chosen, device="cpu")[:chance]
    return torch.cat([drawn.sort().values, torch.arange(before, n, device="cpu")])


def accumulated(q: Tensor, k: Tensor, seen: Tensor, scale: float | None = None) -> Tensor:
    """Returns the attention that each token receives from all probes, ``[B, n]`` float32.

    The mean over heads; a row sums to M.

    Args:
        q: ``[B, H, M, d]`` queries of the probes.
        k: ``[B, Hkv, n, d]`` keys of all tokens.
        seen: ``[M, n]`` bool, what each probe sees.
        scale: factor of the products; None = ``d ** -0.5``.
    """
    return attn_rows(q, k, scale=scale, seen=seen) * q.shape[2]


def needed(mass: Tensor, tau: float, total: float) -> Tensor:
    """Returns how many tokens hold the share ``tau`` of ``total``, ``[B]`` int64, at least 1.

    That is the least number of the largest of ``mass`` ``[B, n]`` whose sum reaches it; all where
    rounding lets not even all of them do so.

    Raises:
        ConfigError: ``tau`` is no share.
    """
    if not 0 < tau <= 1:
        raise ConfigError(f"tau={tau!r} is no share of attention; give one above 0 and up to 1.")
    held = mass.double().sort(dim=1, descending=True).values.cumsum(1)
    return ((held < tau * total).sum(1) + 1).clamp(max=mass.shape[1])


def per_viewer(mass: Tensor, seen: Tensor) -> Tensor:
    """Returns ``mass`` ``[B, n]`` by the number of probes that see each token; 0 of none.

    Early tokens are seen by more of them, so the sum alone would favour those.
    """
    return mass / seen.sum(0).clamp(min=1)


def important(scores: Tensor, counts: Tensor, always: Tensor) -> Tensor:
    """Returns which tokens matter, ``[B, n]`` bool.

    Args:
        scores: ``[B, n]``, of which the highest ``counts`` ``[B]`` do; ties to the lower index.
        always: ``[B, n]`` bool, those that do besides.

    Raises:
        InputError: shapes that do not fit together.
    """
    if always.shape != scores.shape or counts.shape != scores.shape[:1]:
        raise InputError(
            f"scores are {list(scores.shape)}, counts {list(counts.shape)} and always "
            f"{list(always.shape)}; give [B, n], [B] and [B, n]."
        )
    rank = ranked(scores).argsort(dim=1)
    return (rank < counts[:, None]) | always
