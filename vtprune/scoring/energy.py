"""Tokens matched by how redundant they are: the more tokens are like one, the higher its energy."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import elu

from vtprune.kernels._common import full_precision
from vtprune.kernels.topk_sorted import ranked
from vtprune.scoring.diversity import ONE, outside, unit
from vtprune.scoring.matching import closest, goes_into


def energies(similarity: Tensor, margin: float, alpha: float) -> Tensor:
    """Returns how redundant each token is, ``[B, N]``: the mean over all tokens, itself among them.

    Args:
        similarity: ``[B, N, N]``; above ``margin`` it counts as it is, below it less and less, down
            to ``-alpha``.
    """
    return elu(similarity - margin, alpha).mean(-1)


def match_by_energy(
    metric: Tensor, r: int, margin: float, alpha: float, protect: bool
) -> tuple[Tensor, Tensor]:
    """Puts ``r`` tokens into the most similar one of those between them in the order of energies.

    Tokens are taken by falling energy, ties by index: those at even places of that order look for
    one at an odd place. Similarity is the cosine; tokens with NaN or inf resemble none.

    Args:
        metric: ``[B, N, D]``; r: up to N // 2.
        protect: whether only the ``2 r`` of highest energy take part, so that all at even places
            leave; or else all take part, and the best pairs merge.

    Returns:
        The tokens that are left, ``[B, N - r]`` int64, ascending; and which of these outputs each
        token goes into, ``[B, N]`` int64.
    """
    x, broken = unit(metric)
    with full_precision(x):
        similarity = x @ x.mT
    similarity = similarity.masked_fill(similarity > ONE, 1.0)
    energy = energies(similarity, margin, alpha).masked_fill(broken, -torch.inf)
    order = ranked(energy)[:, : 2 * r if protect else None]
    even, odd = order[:, ::2], order[:, 1::2]
    hidden = broken[:, :, None] | broken[:, None]
    between = similarity.masked_fill(hidden, -torch.inf)
    between = _columns(_columns(between, odd).mT, even).mT  # [B, even, odd]
    source, partner = closest(between, r)
    gone = even.gather(1, source)
    rows = outside(gone, metric.shape[1])
    return rows, goes_into(rows, gone, odd.gather(1, partner), metric.shape[1])


def _columns(x: Tensor, index: Tensor) -> Tensor:
    """Returns columns ``index`` ``[B, K]`` of ``[B, M, N]``."""
    return x.gather(2, index[:, None].expand(-1, x.shape[1], -1))
