"""DivPrune: one image, or its tiles packed with newlines as LLaVA-NeXT does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import vtprune
from tests.golden_harness import Output, Tensors
from vtprune.kernels.greedy_select import greedy_select
from vtprune.types import Signals


def from_golden(params: dict[str, Any], tensors: Tensors) -> dict[str, Output]:
    hidden = tensors["in.hidden"]
    packed = _pack(hidden, tensors["in.image_newline"], params) if params["tiles"] > 1 else hidden
    selection = vtprune.select("divprune", keep=params["ratio"], signals=Signals(packed))
    keep, order = selection.rows, greedy_select(packed, selection.rows.shape[1])
    ours: dict[str, Output] = {
        "out.keep": keep,
        "out.order": order,
        "out.tokens": selection.apply(packed).flatten(0, 1),
    }
    if params["tiles"] > 1:
        group = _first_equal(packed[0])
        recorded = group[tensors["out.keep"]], group[tensors["out.order"]]
        ours["out.keep"] = group[keep].sort().values, recorded[0].sort().values
        ours["out.order"] = group[order], recorded[1]
        ours["out.packed"] = packed[0]
        ours["out.group"] = group
    return ours


def _pack(hidden: Tensor, newline: Tensor, params: dict[str, Any]) -> Tensor:
    """Base tile, then the rows of the unpadded grid, each followed by a newline: ``[1, n, C]``."""
    across, down = params["grid_tiles_wh"]
    height, width = params["grid"]
    grid = hidden[1:].unflatten(1, (height, width)).unflatten(0, (down, across))
    grid = grid.permute(0, 2, 1, 3, 4).flatten(2, 3).flatten(0, 1)  # [rows, columns, C]
    grid = unpad(grid, *params["image_size_wh"])
    rows = torch.cat([grid, newline.expand(len(grid), 1, -1)], dim=1)
    return torch.cat([hidden[0], rows.flatten(0, 1)])[None]


def unpad(grid: Tensor, image_width: int, image_height: int) -> Tensor:
    """Removes the rows or columns that only pad the image to the shape of the grid."""
    height, width = grid.shape[:2]
    if image_width / image_height > width / height:
        margin = (height - int(image_height * (width / image_width))) // 2
        return grid[margin : height - margin]
    margin = (width - int(image_width * (height / image_height))) // 2
    return grid[:, margin : width - margin]


def _first_equal(tokens: Tensor) -> Tensor:
    """Returns for each token of ``[n, C]`` the first position of an identical one."""
    same = (tokens[:, None] == tokens[None]).all(-1)
    return same.int().argmax(1)
