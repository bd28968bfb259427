"""LLaVA-NeXT: a base view and tiles, stitched and cropped to the image, with newlines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from vtprune.vlm_adapters._anyres import Anyres
from vtprune.vlm_adapters._base import Batch


class LlavaNext(Anyres):
    """``llava-v1.6`` checkpoints."""

    classes: ClassVar = ("LlavaNextForConditionalGeneration",)
    title: ClassVar = "LLaVA-NeXT"

    def n_tiles(self, batch: Batch) -> list[int]:
        pins, side = self.model.config.image_grid_pinpoints, self.model.config.vision_config
        return [
            image_size_to_num_patches(size, pins, side.image_size) for size in batch["image_sizes"]
        ]

    def stitch(self, tiles: Sequence[Tensor], newline: Tensor, batch: Batch) -> list[Tensor]:
        select = self.model.config.vision_feature_select_strategy
        return self.base.pack_image_features(
            tiles,
            batch["image_sizes"],
            vision_feature_select_strategy=select,
            image_newline=newline,
        )[0]
