"""HoloV: images, and the packed tokens of a tiled one."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import vtprune
from tests.golden_adapters._tower import signals_of, tower
from tests.golden_adapters.divprune import unpad
from tests.golden_harness import Output, Tensors
from vtprune.registry import build
from vtprune.scoring.attention import salience
from vtprune.scoring.crops import crop_scores, quotas
from vtprune.types import Quantity, Signals


def from_golden(params: dict[str, Any], tensors: Tensors) -> dict[str, Output]:
    option = {"crops": params["crops"], "alpha": params["alpha"]}
    ours, official = (build("holov", compat=compat, **option) for compat in (False, True))
    signals = signals_of(ours, tower(), tensors)
    if params.get("grid_tiles_wh"):
        values: dict[Quantity, Tensor] = {
            need: _pack(value[..., None], params)[..., 0] for need, value in signals.values.items()
        }
        signals = Signals(_pack(signals.tokens, params), values=values)
    k = params["tokens"]
    selection = vtprune.select(official, keep=k, signals=signals)
    order = selection.rows
    keep = _ascending(order)
    if bool((order >= 0).all()):
        keep = vtprune.select(ours, keep=k, signals=signals).rows
    worth = crop_scores(signals.tokens, salience(signals), params["crops"], params["alpha"])
    return {
        "out.keep": keep,
        "out.order": order,
        "out.tokens": selection.apply(signals.tokens).view_as(tensors["out.tokens"]),
        "out.quota": quotas(worth, k),
    }


def _ascending(order: Tensor) -> Tensor:
    """Sorts each row and moves -1 to its end, ``[B, most]``."""
    kept = [row[row >= 0].sort().values for row in order]
    most = max(len(row) for row in kept)
    return torch.stack([F.pad(row, (0, most - len(row)), value=-1) for row in kept])


def _pack(tiles: Tensor, params: dict[str, Any]) -> Tensor:
    """Base tile, then the unpadded grid of the others without newlines: ``[1, n, C]``."""
    across, down = params["grid_tiles_wh"]
    grid = tiles[1:].unflatten(1, params["grid"]).unflatten(0, (down, across))
    grid = grid.permute(0, 2, 1, 3, 4).flatten(2, 3).flatten(0, 1)  # [rows, columns, C]
    return torch.cat([tiles[0], unpad(grid, *params["image_size_wh"]).flatten(0, 1)])[None]
