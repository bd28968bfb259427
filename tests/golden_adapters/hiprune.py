"""HiPrune: images, the tiles of one image, and merged tokens of a tower that sees windows.

``out.keep`` is the official arithmetic (``compat``); where it is no quirk the default must agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.image_processing_utils import select_best_resolution

import vtprune
from tests.golden_adapters._tower import packed_order, signals_of, tower
from tests.golden_harness import Output, Tensors
from vtprune.kernels.attn_received import attn_received
from vtprune.kernels.topk_sorted import topk_sorted
from vtprune.registry import build
from vtprune.scoring.hierarchy import claims
from vtprune.types import Keep, Quantity, Received, Signals


def from_golden(params: dict[str, Any], tensors: Tensors) -> dict[str, Output]:
    layers = (params["object_layer_1based"] - 1, params["deep_layer_0based"])
    if "in.window_index" in tensors:
        outputs = _merged(params, tensors, layers)
    else:
        outputs = _tower(params, tensors, layers)
    if not {"out.keep_no_wrap", "out.keep_exact_budget"} & set(tensors):
        assert torch.equal(outputs["out.keep"], outputs["out.keep_no_wrap"])
    return {name: value for name, value in outputs.items() if name in tensors}


def _rows(params: dict[str, Any], layers: tuple[int, int], keep: Keep, signals: Signals):
    """What the default and the official arithmetic keep."""
    option = {"alpha": params["alpha"], "layers": layers}
    both = (build("hiprune", compat=compat, **option) for compat in (False, True))
    return [vtprune.select(strategy, keep=keep, signals=signals).rows for strategy in both]


def _tower(params: dict[str, Any], tensors: Tensors, layers: tuple[int, int]) -> dict[str, Tensor]:
    height, width = params["grid"]
    signals = signals_of(build("hiprune", layers=layers), tower(), tensors)
    signals.grid = (1, height, width)
    k = params["tokens_per_tile"]
    sane, official = _rows(params, layers, k, signals)
    tokens = torch.stack([x[kept] for x, kept in zip(signals.tokens, official, strict=True)])
    outputs = {
        "out.keep": official,
        "out.keep_no_wrap": sane,
        "out.scores": signals.stack(Received).transpose(0, 1),
        "out.tokens": tokens,
    }
    if params.get("image_size_wh"):
        order = packed_order(official, params["grid"], _tiles_wh(params))
        outputs["out.tile_patch"] = torch.stack([order // k, official.flatten()[order]], dim=1)
        outputs["out.tokens"] = tokens.flatten(0, 1)[order].view_as(tensors["out.tokens"])
    return outputs


def _tiles_wh(params: dict[str, Any]) -> Sequence[int]:
    """Tiles across and down; where the case does not say, by the rule of LLaVA-NeXT."""
    if "grid_tiles_wh" in params:
        return params["grid_tiles_wh"]
    image, pinpoints = params["image_size_wh"], params["grid_pinpoints_wh"]
    height, width = select_best_resolution(image[::-1], [(h, w) for w, h in pinpoints])
    return width // params["tile_pixels"], height // params["tile_pixels"]


def _merged(params: dict[str, Any], tensors: Tensors, layers: tuple[int, int]) -> dict[str, Tensor]:
    """Merged tokens, whose patches wait in the order of windows."""
    raster = tensors["in.window_index"].argsort()
    values: dict[Quantity, Tensor] = {}
    for layer in layers:
        patches = attn_received(tensors[f"in.q{layer}"], tensors[f"in.k{layer}"])
        values[Received(layer)] = patches.unflatten(1, (-1, 4)).mean(2)[:, raster]
    height, width = params["merged_grid_hw"]
    hidden = tensors["in.hidden"]
    signals = Signals(hidden[None], (1, height, width), values=values)
    sums = signals.stack(Received) * 4 * len(raster)  # the official code sums over queries
    sane, exact = _rows(params, layers, params["retention"], signals)
    assert exact.shape[1] == params["budget"]
    keep = exact if params["kept"] == params["budget"] else _too_few(params, sums)
    return {
        "out.keep": keep,
        "out.keep_exact_budget": exact,
        "out.keep_no_wrap": sane,
        "out.scores": sums[:, 0],
        "out.tokens": hidden[keep[0]],
    }


def _too_few(params: dict[str, Any], sums: Tensor) -> Tensor:
    """What stays when 1 is taken off chosen tokens, which does not exclude them: ``[1, K]``.

    No strategy keeps fewer than asked, so this puts the same parts together the official way.
    """
    middle, deep = sums
    claim = claims(middle, params["n_anchor"], (1, *params["merged_grid_hw"]), wrap=True)
    cluster = claim < claim.max()
    registers = topk_sorted(deep - cluster.float(), params["budget"] - int(cluster.sum()))
    return cluster.scatter(1, registers, True)[0].nonzero()[:, 0][None]
