"""VisPruner: images and the tiles of one image."""

from __future__ import annotations

from typing import Any

import torch

import vtprune
from tests.golden_adapters._tower import packed_order, signals_of, tower
from tests.golden_harness import Output, Tensors
from vtprune.registry import build
from vtprune.scoring.attention import salience


def from_golden(params: dict[str, Any], tensors: Tensors) -> dict[str, Output]:
    strategy = build("vispruner", important=params["important_ratio"])
    signals = signals_of(strategy, tower(), tensors)
    k = params["tokens_per_image_or_tile"]
    selection = vtprune.select(strategy, keep=k, signals=signals)
    tokens = selection.apply(signals.tokens).flatten(0, 1)
    ours: dict[str, Output] = {
        "out.keep": selection.rows,
        "out.scores": salience(signals),
        "out.tokens": tokens,
    }
    if "grid_tiles_wh" in params:
        order = packed_order(selection.rows, params["grid"], params["grid_tiles_wh"])
        patch = selection.rows.flatten()[order]
        ours["out.tile_patch"] = torch.stack([order // k, patch], dim=1)
        ours["out.tokens"] = tokens[order]
    return ours
