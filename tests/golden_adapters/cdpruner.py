"""CDPruner: an image, or the tiles of one, with recorded embeddings of both CLIP towers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import vtprune
from tests.golden_adapters._tower import packed_order
from tests.golden_harness import Output, Tensors
from vtprune.kernels.greedy_select import greedy_select
from vtprune.registry import build
from vtprune.scoring.guidance import guidance, unit_range
from vtprune.types import Joint, Signals


def from_golden(params: dict[str, Any], tensors: Tensors) -> dict[str, Output]:
    hidden = tensors["in.hidden"]
    k = params["tokens_per_image_or_tile"]
    signals = Signals(
        hidden,
        item=torch.zeros(len(hidden), dtype=torch.int64),  # tiles of one image
        values={Joint(22): tensors["in.image_embeds"]},
        text=[tensors["in.text_embeds"]] * len(hidden),
    )
    selection = vtprune.select(build("cdpruner"), keep=k, signals=signals)
    weights = unit_range(guidance(signals), signals.item)
    flat = selection.apply(hidden).flatten(0, 1)
    ours: dict[str, Output] = {
        "out.keep": selection.rows,
        "out.order": greedy_select(hidden, k, mode="dpp", relevance=weights),
        "out.relevance": weights,
        "out.tokens": flat,
    }
    if "grid_tiles_wh" in params:
        order = packed_order(selection.rows, params["grid"], params["grid_tiles_wh"])
        ours["out.tokens"] = flat[order]
        ours["out.tile_patch"] = _tile_patch(selection.rows)[order]
    return ours


def _tile_patch(rows: Tensor) -> Tensor:
    """Tile and patch of each kept token, ``[tiles * K, 2]``."""
    tile = torch.arange(len(rows))[:, None].expand_as(rows)
    return torch.stack([tile.flatten(), rows.flatten()], dim=1)
