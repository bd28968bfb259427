"""Wrapped calls on tiny families, and of what tile each of their tokens is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import vtprune
from tests.families.eager import TOWERS, encode, lengths, mapping, modalities, patches
from tests.families.oracles import inputs_of, model_of
from vtprune.types import TowerNeed


def call(family: str, kind: str, strategy: Any, keep: Any, **wrap: Any) -> vtprune.Handle:
    """Runs a wrapped call and returns its handle."""
    model, processor = model_of(family)
    given = {"processor": processor, **wrap}
    with vtprune.wrap(model, strategy, keep=keep, **given) as handle, torch.no_grad():
        model(**inputs_of(family, kind))
    return handle


def tiles_of(family: str, kind: str) -> list[Tensor]:
    """Returns per item the tile or frame of each token, -1 = of none, -2 = of several.

    Read off the unwrapped model's derivatives: no adapter is asked.
    """
    found = []
    for name in modalities(family, kind):
        weights = mapping(family, kind, name)
        tile = _tile_of_patch(family, kind, name)
        masses = torch.zeros(len(weights), int(tile.max()) + 1).index_add_(1, tile, weights)
        own = torch.where(masses.amax(1) > 1 - 1e-6, masses.argmax(1), -2)
        found += own.masked_fill(weights.sum(1) == 0, -1).split(lengths(family, kind, name))
    return found


def _tile_of_patch(family: str, kind: str, name: str) -> Tensor:
    inputs = inputs_of(family, kind)
    if f"{name}_grid_thw" in inputs:
        sizes = [h * w for t, h, w in inputs[f"{name}_grid_thw"].tolist() for _ in range(t)]
    else:
        with torch.no_grad():
            states = encode(family, kind, name).last_hidden_state
        sizes = [states.shape[1] - TOWERS[family].n_prefix] * len(states)
    return torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))


def kept_of(handle: vtprune.Handle) -> list[Tensor]:
    """Returns per item the tokens made of patches that stayed, ascending."""
    return [
        torch.tensor(sorted(set(s.slots[0].tolist()) - set(item.fixed.tolist())))
        for s, item in zip(handle.selections, handle._items, strict=True)
    ]


def per_tile(family: str, kind: str, need: TowerNeed, k: int) -> list[list[int]]:
    """Returns per item the best ``k`` of each whole tile by an eager quantity."""
    found = []
    for name in modalities(family, kind):
        values = mapping(family, kind, name) @ patches(family, kind, name)[need]
        pieces = values.split(lengths(family, kind, name))
        for tiles, own in zip(tiles_of(family, kind), pieces, strict=True):
            spots = [(tiles == t).nonzero()[:, 0] for t in tiles[tiles >= 0].unique()]
            best = torch.cat([spot[own[spot].topk(k).indices] for spot in spots])
            found.append(best.sort().values.tolist())
    return found
