"""FasterVLM: images, the tiles of one image, and the frames of videos."""

from __future__ import annotations

from typing import Any

import torch

import vtprune
from tests.golden_adapters._tower import packed_order, signals_of, tower
from tests.golden_harness import Output, Tensors
from vtprune.registry import build


def from_golden(params: dict[str, Any], tensors: Tensors) -> dict[str, Output]:
    strategy = build("fastervlm")
    signals = signals_of(strategy, tower(), tensors)
    k = params["tokens_per_frame" if "frames" in params else "tokens_per_image_or_tile"]
    selection = vtprune.select(strategy, keep=k, signals=signals)
    tokens = selection.apply(signals.tokens)
    ours: dict[str, Output] = {"out.keep": selection.rows, "out.tokens": tokens}
    if "out.scores" in tensors:
        ours["out.scores"] = strategy.score(signals)
    if "frames" in params:
        ours["out.tokens"] = tokens.unflatten(0, (params["videos"], params["frames"]))
    if "grid_tiles_wh" in params:
        order = packed_order(selection.rows, params["grid"], params["grid_tiles_wh"])
        patch = selection.rows.flatten()[order]
        ours["out.tile_patch"] = torch.stack([order // k, patch], dim=1)
        ours["out.tokens"] = tokens.flatten(0, 1)[order][None]
    return ours
