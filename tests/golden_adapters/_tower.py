"""Signals from the recorded q and k of a CLIP tower, and the order of tiles in a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vtprune.kernels.attn_received import attn_received
from vtprune.kernels.attn_rows import attn_rows
from vtprune.types import ClsRow, Facts, Keys, Quantity, Received, Signals, Strategy, TowerNeed


def tower(blocks: int = 24) -> Facts:
    """The authors' tower: features are the output of the block before the last."""
    return Facts(
        vision_layers=blocks,
        feature_block=blocks - 2,
        has_cls=True,
        signals=Facts.signals_of(cls_row=True),
    )


def signals_of(strategy: Strategy, facts: Facts, tensors: Mapping[str, Tensor]) -> Signals:
    """Computes what ``strategy`` reads from ``in.q<l>``, ``in.k<l>``; CLS is token 0."""
    needs = strategy.plan(facts)[0].tower_needs
    values: dict[Quantity, Tensor] = {need: _value(need, tensors) for need in needs}
    return Signals(tokens=tensors["in.hidden"][:, 1:], values=values)


def _value(need: TowerNeed, tensors: Mapping[str, Tensor]) -> Tensor:
    if isinstance(need, ClsRow):
        q, k = tensors[f"in.q{need.layer}"], tensors[f"in.k{need.layer}"]
        return attn_rows(q[:, :, :1], k)[:, 1:]
    if isinstance(need, Received):
        return attn_received(tensors[f"in.q{need.layer}"], tensors[f"in.k{need.layer}"])[:, 1:]
    if isinstance(need, Keys):
        return tensors[f"in.k{need.layer}"].mean(1)[:, 1:]
    raise NotImplementedError(f"The recorded tower gives no {need}.")


def packed_order(keep: Tensor, grid: Sequence[int], tiles_wh: Sequence[int]) -> Tensor:
    """Returns the order in which the kept patches of an image's tiles reach the language model.

    The base tile comes first as it is, the others in the raster of the stitched grid.

    Args:
        keep: ``[1 + tiles, K]`` patch ids.
        grid: rows and columns of a tile.
        tiles_wh: tiles across and down.

    Returns:
        ``[(1 + tiles) * K]`` int64 into the flattened ``keep``.
    """
    height, width = grid
    across = tiles_wh[0]
    tile = torch.arange(len(keep) - 1)[:, None]
    y = tile // across * height + keep[1:] // width
    x = tile % across * width + keep[1:] % width
    raster = (y * across * width + x).flatten()
    k = keep.shape[1]
    return torch.cat([torch.arange(k), k + raster.argsort()])
