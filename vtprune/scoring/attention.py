"""Scores from the vision tower's attention."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vtprune.types import (
    ClsRow,
    Facts,
    Need,
    Received,
    Signals,
    TowerNeed,
    WideClsRow,
    WideKeys,
)


def salience_needs(layers: Sequence[int], facts: Facts) -> tuple[TowerNeed, ...]:
    """Returns what tells a patch's salience: the CLS row, or attention received without a CLS."""
    kind = ClsRow if facts.has_cls else Received
    return tuple(kind(layer) for layer in layers)


def salience(signals: Signals) -> Tensor:
    """Returns the salience of each patch, summed over the layers read: ``[B, N]`` float32."""
    return signals.stack(ClsRow, Received).sum(0)


def wide_needs(layer: int, facts: Facts) -> tuple[Need, ...]:
    """Returns the needs of one attention head as wide as the tower: salience and keys.

    Without a CLS the salience is attention received, of the heads as they are.
    """
    kind = WideClsRow if facts.has_cls else Received
    return kind(layer), WideKeys(layer)


def wide(signals: Signals) -> tuple[Tensor, Tensor]:
    """Returns what ``wide_needs`` gives: salience ``[B, N]`` and keys ``[B, N, d]``, float32."""
    return signals.stack(WideClsRow, Received)[-1], signals.stack(WideKeys)[-1]
