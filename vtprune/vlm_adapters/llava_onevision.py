"""LLaVA-OneVision: tiles resized where there are many, newlines; frames of a video pooled 2 x 2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from transformers.models.llava_onevision.modeling_llava_onevision import image_size_to_num_patches

from vtprune.vlm_adapters._anyres import Anyres
from vtprune.vlm_adapters._base import Batch, Grid, Modality, frames, square


class LlavaOnevision(Anyres):
    """A video ends with one newline. Both kinds of resizing are the model's own."""

    classes: ClassVar = ("LlavaOnevisionForConditionalGeneration",)
    title: ClassVar = "LLaVA-OneVision"
    takes: ClassVar = "images, videos"
    fixed: ClassVar = (*Anyres.fixed, "vision_aspect_ratio")
    in_tower: ClassVar = False

    def n_tiles(self, batch: Batch) -> list[int]:
        config, sizes = self.model.config, batch["image_sizes"]
        side = config.vision_config.image_size
        counts = [image_size_to_num_patches(s, config.image_grid_pinpoints, side) for s in sizes]
        images = batch.get("batch_num_images")
        if images is None:
            return counts
        alone = [n == 1 for n in map(int, images) for _ in range(n)]  # of several none is tiled
        return [n if single else 1 for n, single in zip(counts, alone, strict=True)]

    def stitch(self, tiles: Sequence[Tensor], newline: Tensor, batch: Batch) -> list[Tensor]:
        ratio = self.model.config.vision_aspect_ratio
        return self.base.pack_image_features(
            tiles, batch["image_sizes"], image_newline=newline, vision_aspect_ratio=ratio
        )[0]

    def carry(self, modality: Modality, patches: Tensor, batch: Batch) -> list[Tensor]:
        if modality.name == "image":
            return super().carry(modality, patches, batch)
        pooled = self.base.apply_pooling(patches.unflatten(0, (-1, self.n_patches)))
        videos = pooled.unflatten(0, (-1, frames(batch))).flatten(1, 2)
        newline = videos.new_full((len(videos), 1, videos.shape[2]), torch.nan)
        return list(torch.cat([videos, newline], dim=1))

    def grids(self, modality: Modality, lengths: Sequence[int], batch: Batch) -> list[Grid | None]:
        if modality.name == "image":
            return super().grids(modality, lengths, batch)
        return [square(n, frames(batch)) for n in lengths]
