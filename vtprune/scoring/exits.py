"""When all visual tokens leave: the first layer at which a gate's margin is above a threshold."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def exits(margins: Tensor, threshold: float) -> Tensor:
    """Returns which of n stages each sample leaves at, n = none: ``[S]`` int64.

    Args:
        margins: ``[S, n]``, NaN = never; tokens leave at the first above ``threshold``.
    """
    highest = margins.float().nan_to_num(nan=-torch.inf).cummax(1).values
    return (highest <= threshold).sum(1)


def mean_share(margins: Tensor, layers: Sequence[int], depth: int, threshold: float) -> float:
    """Returns the share of visual tokens that enter a layer, the mean over samples and layers.

    Args:
        margins: ``[S, n]``, one per sample and each of the n ``layers`` before which it may leave.
        layers: 0-based, ascending; ``depth``: number of layers.
    """
    entered = torch.tensor([*layers, depth])[exits(margins, threshold)]
    return float(entered.double().mean()) / depth


def threshold_for(margins: Tensor, layers: Sequence[int], depth: int, share: float) -> float:
    """Returns the threshold by which ``mean_share`` is nearest to ``share``; of two the lower.

    A ``share`` of 1 or more is that of no exit at all, whatever the margins.
    """
    if share >= 1:
        return torch.inf
    highest = margins.float().nan_to_num(nan=-torch.inf).cummax(1).values
    steps = [-torch.inf, *highest.unique().tolist()]
    low, high = 0, len(steps) - 1  # the share grows with the threshold
    while low < high:
        middle = (low + high) // 2
        if mean_share(margins, layers, depth, steps[middle]) < share:
            low = middle + 1
        else:
            high = middle
    near = steps[max(0, low - 1) : low + 1]
    return min(near, key=lambda t: abs(mean_share(margins, layers, depth, t) - share))
