"""Families that cut an image into a base view and tiles, which they stitch; newlines end rows."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from vtprune.vlm_adapters._base import Batch, Grid, Modality
from vtprune.vlm_adapters._clip import ClipLike


class Anyres(ClipLike):
    """The model's own packer carries values from tiles to tokens; NaN takes a newline's place."""

    newlines: ClassVar = True

    @abstractmethod
    def n_tiles(self, batch: Batch) -> list[int]:
        """Returns the tiles of each image, the base view among them."""

    @abstractmethod
    def stitch(self, tiles: Sequence[Tensor], newline: Tensor, batch: Batch) -> list[Tensor]:
        """Packs ``[tiles, N, C]`` of each image to ``[n_i, C]``."""

    def carry(self, modality: Modality, patches: Tensor, batch: Batch) -> list[Tensor]:
        tiles = patches.unflatten(0, (-1, self.n_patches)).split(self.n_tiles(batch))
        return self.stitch(tiles, patches.new_full(patches.shape[1:], torch.nan), batch)

    def grids(self, modality: Modality, lengths: Sequence[int], batch: Batch) -> list[Grid | None]:
        return [None] * len(lengths)  # a base view, then another grid
