"""Patches that left between the blocks of a tower, hidden from those of a full-length one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from vtprune.engine import tower
from vtprune.engine.plan import find_adapter

Cut = tuple[int, list[Tensor]]


class Watch:
    """What every cut between blocks left, as one wrapped call ran."""

    def __init__(self) -> None:
        self._cuts: list[Cut] = []
        self._ways: list[tuple[tower.Climb, list[Cut]]] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        cut, give_back = tower._cut, tower.Climb._give_back

        def seen(step: Any, tiles: Any, inside: Any, n_prefix: int) -> None:
            cut(step, tiles, inside, n_prefix)
            self._cuts.append((inside.layers[inside.stage], [tile.alive for tile in tiles]))

        def arrived(climb: tower.Climb) -> None:
            give_back(climb)
            self._ways.append((climb, self._cuts))
            self._cuts = []

        with patch.object(tower, "_cut", seen), patch.object(tower.Climb, "_give_back", arrived):
            yield

    @contextmanager
    def hiding(self, wrapped: Any, model: Any) -> Iterator[None]:
        """Hides in ``model`` what left ``wrapped``, the same model, in its last encodings."""
        ours, theirs = find_adapter(wrapped), find_adapter(model)
        with ExitStack() as undo:
            for modality in ours.modalities:
                own = ours.blocks(modality)[0]
                ways = [way for way in self._ways if way[0].blocks.modules[0] is own]
                for number, alive in ways[-1][1] if ways else ():
                    mask = _mask(ways[-1][0], alive)
                    for block in list(theirs.blocks(modality))[number + 1 :]:
                        hook = block.register_forward_pre_hook(_hide(mask))
                        undo.callback(hook.remove)
            yield


def _mask(climb: tower.Climb, alive: list[Tensor]) -> Tensor:
    """Added to the products of queries and keys, ``[tiles, 1, S, S]``."""
    tiles, length, _ = climb.shape
    p = climb.blocks.n_prefix
    mask = torch.zeros(tiles, 1, 1, length)
    for b, patches in zip(climb.tiles, alive, strict=True):
        mask[b, ..., p:] = torch.finfo(mask.dtype).min
        mask[b, ..., p + patches] = 0
    return mask.expand(-1, -1, length, -1)


def _hide(mask: Tensor) -> Any:
    def hook(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return args[0], mask, *args[2:]

    return hook
