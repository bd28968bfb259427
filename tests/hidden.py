"""Patches that left or merged on the way through the tower, hidden in one that stays full-length.

What merged is written into the slots of the places that it merged into, and its keys weigh as much
as the patches that it stands for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from tests.families.reference import mixed
from vtprune.engine import tower
from vtprune.engine.plan import find_adapter
from vtprune.types import Selection


@dataclass(frozen=True)
class Cut:
    """What a stage chose of the patches of each tile."""

    number: int
    before_mlp: bool
    proportional: bool
    chosen: list[Selection]


class Watch:
    """What every stage in the tower left, as one wrapped call ran."""

    def __init__(self) -> None:
        self._cuts: list[Cut] = []
        self._ways: list[tuple[tower.Climb, list[Cut]]] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        decide, give_back = tower.decide, tower.Climb._give_back

        def seen(step: Any, images: Any) -> list[Selection]:
            chosen, stage = decide(step, images), step.stage
            number = images.inside.layers[images.inside.stage]
            self._cuts.append(Cut(number, stage.before_mlp, stage.proportional, chosen))
            return chosen

        def arrived(climb: tower.Climb) -> None:
            give_back(climb)
            self._ways.append((climb, self._cuts))
            self._cuts = []

        with patch.object(tower, "decide", seen), patch.object(tower.Climb, "_give_back", arrived):
            yield

    @contextmanager
    def hiding(self, wrapped: Any, model: Any) -> Iterator[None]:
        """Hides in ``model`` what left ``wrapped``, the same model, in its last encodings."""
        ours, theirs = find_adapter(wrapped), find_adapter(model)
        with ExitStack() as undo:
            for modality in ours.modalities:
                own = ours.blocks(modality)[0]
                ways = [way for way in self._ways if way[0].blocks.modules[0] is own]
                blocks = list(theirs.blocks(modality))
                for climb, cuts in ways[-1:]:
                    for hook in _hooks(climb, cuts, blocks):
                        undo.callback(hook.remove)
            yield


def _hooks(climb: tower.Climb, cuts: list[Cut], blocks: list[Any]) -> Iterator[Any]:
    """Registers all that hides what left, stage by stage."""
    tiles = {b: (climb.spots[b], torch.ones(len(climb.spots[b]))) for b in climb.tiles}
    touched: dict[int, tuple[Tensor, Tensor]] = {}
    for cut in cuts:
        pairs: dict[int, tuple[Selection, Tensor, Tensor]] = {}
        for (b, (places, sizes)), chosen in zip(tiles.items(), cut.chosen, strict=True):
            if not chosen.is_identity:
                left = places[_slots(chosen)]
                pairs[b] = chosen, places, left
                touched[b] = left, _summed(chosen, sizes)
        tiles |= touched
        block, write = blocks[cut.number], _writer(pairs, climb.blocks.n_prefix)
        if cut.before_mlp:  # what the norm gets is the very tensor that the MLP is added to
            yield block.layer_norm2.register_forward_pre_hook(lambda _, x, write=write: write(x[0]))
        else:
            yield block.register_forward_hook(lambda _, x, y, write=write: write(y))
        mask = _mask(climb, touched, cut.proportional)
        for later in blocks[cut.number + 1 :]:
            yield later.register_forward_pre_hook(_hide(mask))


def _slots(chosen: Selection) -> list[int]:
    """The place of each output, of new ones the first that is free."""
    rows = chosen.rows[0].tolist()
    free = iter(sorted(set(range(chosen.n)) - set(rows)))
    return [next(free) if row == -1 else row for row in rows]


def _summed(chosen: Selection, sizes: Tensor) -> Tensor:
    """How many patches each output stands for."""
    if chosen.sizes is not None:
        return chosen.sizes[0]
    if chosen.mix is None:
        return sizes[chosen.rows[0]]
    total = torch.zeros(chosen.rows.shape[1])
    for source, target in zip(chosen.mix.source[0], chosen.mix.target[0], strict=True):
        total[target] += sizes[source]
    return total


def _writer(pairs: Mapping[int, tuple[Selection, Tensor, Tensor]], p: int) -> Any:
    """Writes what a stage makes of the patches at some places to the places of its outputs."""

    def write(states: Tensor) -> None:
        for b, (chosen, places, left) in pairs.items():
            states[b, p + left] = mixed(chosen, states[b, p + places])

    return write


def _mask(
    climb: tower.Climb, tiles: Mapping[int, tuple[Tensor, Tensor]], proportional: bool
) -> Tensor:
    """Added to the products of queries and keys, ``[tiles, 1, S, S]``."""
    n_tiles, length, _ = climb.shape
    p = climb.blocks.n_prefix
    mask = torch.zeros(n_tiles, 1, 1, length)
    for b, (places, sizes) in tiles.items():
        mask[b, ..., p:] = torch.finfo(mask.dtype).min
        mask[b, ..., p + places] = sizes.log() if proportional else 0.0
    return mask.expand(-1, -1, length, -1)


def _hide(mask: Tensor) -> Any:
    def hook(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return args[0], mask, *args[2:]

    return hook
