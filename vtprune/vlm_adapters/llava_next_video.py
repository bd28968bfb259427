"""LLaVA-NeXT-Video: LLaVA-NeXT for images; the frames of a video are pooled 2 x 2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from vtprune.errors import UnsupportedError
from vtprune.types import Facts
from vtprune.vlm_adapters._base import Batch, Grid, Modality, frames, square
from vtprune.vlm_adapters.llava_next import LlavaNext


class LlavaNextVideo(LlavaNext):
    """The model's own pooling carries values from patches to the tokens of a frame."""

    classes: ClassVar = ("LlavaNextVideoForConditionalGeneration",)
    title: ClassVar = "LLaVA-NeXT-Video"
    takes: ClassVar = "images, videos"
    in_tower: ClassVar = False

    @property
    def facts(self) -> Facts:
        mode = self.model.config.spatial_pool_mode
        if mode != "average":
            raise UnsupportedError(
                f"spatial_pool_mode={mode!r}: only 'average' carries values of patches to tokens."
            )
        return super().facts

    def carry(self, modality: Modality, patches: Tensor, batch: Batch) -> list[Tensor]:
        if modality.name == "image":
            return super().carry(modality, patches, batch)
        pooled = self.base.vision_resampler(patches.unflatten(0, (-1, self.n_patches)))
        return list(pooled.unflatten(0, (-1, frames(batch))).flatten(1, 2))

    def grids(self, modality: Modality, lengths: Sequence[int], batch: Batch) -> list[Grid | None]:
        if modality.name == "image":
            return super().grids(modality, lengths, batch)
        return [square(n, frames(batch)) for n in lengths]
