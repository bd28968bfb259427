"""VisionZip: images and the tiles of one image."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import vtprune
from tests.golden_adapters._tower import packed_order, signals_of, tower
from tests.golden_harness import Output, Tensors
from vtprune.registry import build
from vtprune.types import Selection


def from_golden(params: dict[str, Any], tensors: Tensors) -> dict[str, Output]:
    strategy = build("visionzip", contextual=params["contextual"])
    signals = replace(signals_of(strategy, tower(), tensors), n_prefix=1)
    selection = vtprune.select(strategy, keep=params["total"], signals=signals)
    cls = tensors["in.hidden"][:, :1]
    tokens = selection.apply(torch.cat([signals.tokens, cls], dim=1))
    assert bool((selection.rows[:, 0] == -1).all())
    dominant = selection.rows[:, 1 : params["dominant_incl_cls"]]
    ours: dict[str, Output] = {
        "out.keep": dominant,
        "out.tokens": tokens,
        "out.targets": selection.rows[:, params["dominant_incl_cls"] :],
        "out.counts": _counts(selection)[:, params["dominant_incl_cls"] :],
    }
    if "grid_tiles_wh" in params:
        order = packed_order(dominant, params["grid"], params["grid_tiles_wh"])
        ours["out.packed"] = _pack(tokens, order[dominant.shape[1] :], dominant.shape[1])
    return ours


def _counts(selection: Selection) -> Tensor:
    """Returns how many sources each output has besides itself ``[B, K]``."""
    assert selection.mix is not None
    n_sources = torch.zeros_like(selection.rows)
    n_sources.scatter_add_(1, selection.mix.target, torch.ones_like(selection.mix.target))
    return n_sources - 1


def _pack(tokens: Tensor, order: Tensor, n_dominant: int) -> Tensor:
    """Base tile as it is; then dominant patches, CLS and context tokens of the other tiles."""
    dominant = tokens[:, 1 : 1 + n_dominant].flatten(0, 1)[order]
    cls, context = tokens[1:, 0], tokens[1:, 1 + n_dominant :].flatten(0, 1)
    return torch.cat([tokens[0], dominant, cls, context])
