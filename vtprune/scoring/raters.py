"""Text tokens that rate visual ones, and what their distance alone makes of attention."""

from __future__ import annotations

import torch
from torch import Tensor

from vtprune.errors import InputError
from vtprune.kernels._common import full_precision
from vtprune.types import Likeness, Quantity, Signals, Turned


def raters(signals: Signals, most: int) -> Tensor:
    """Returns which text tokens are liked more than the mean, ``[B, T]`` float32 of 0 and 1.

    All of them where none is. Without text after the image the first counts.

    Args:
        most: T, the most that there are in a row of the batch, at least 1.
    """
    chosen = torch.zeros(len(signals.tokens), most, device=signals.tokens.device)
    for row, likeness in zip(chosen, _after(signals, Likeness), strict=True):
        liked = likeness > likeness.mean()
        row[: max(1, len(liked))] = liked if bool(liked.any()) else 1.0
    return chosen


def distance_bias(signals: Signals, most: int, *, signed: bool = False) -> Tensor:
    """Returns what the rotary embedding makes of queries and keys of ones, ``[B, N, T]`` float32.

    Scaled as attention is; at no distance it is the root of their width. Far apart it would become
    negative, so it ends at 0.5 for a width of 128, and at as much of others.

    Args:
        most: T, as of ``raters``; of rows with fewer the rest is 1.
        signed: let it become negative.
    """
    own = signals.stack(Turned)[-1].float()
    bias = torch.ones(*own.shape[:2], most, device=own.device)
    with full_precision(own):
        for row, keys, text in zip(bias, own, _after(signals, Turned), strict=True):
            queries = text.float() if len(text) else keys[-1:]  # then a visual token is the last
            row[:, : len(queries)] = (keys @ queries.T) * own.shape[2] ** -0.5
    if signed:
        return bias
    return bias.clamp(min=0.5 * (own.shape[2] / 128) ** 0.5)


def _after(signals: Signals, kind: type[Quantity]) -> list[Tensor]:
    """Returns per row what was read last of the tokens after the last visual one.

    Raises:
        InputError: the signals do not hold it.
    """
    after = signals.inside.after if signals.inside else ()
    found = [{need.layer: x for need, x in row.items() if isinstance(need, kind)} for row in after]
    if len(found) < len(signals.tokens) or not all(found):
        raise InputError(
            f"signals.inside.after holds no {kind.__name__}; give that of the tokens after the "
            "last visual one, per row."
        )
    return [layers[max(layers)] for layers in found]
