"""Video-LLaVA: two CLIP towers; of a frame the language model gets the [CLS] too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vtprune.vlm_adapters._base import Batch, Grid, Modality, frames, square
from vtprune.vlm_adapters._clip import ClipLike


class VideoLlava(ClipLike):
    """The [CLS] of a frame is no patch: it always stays, and no budget counts it."""

    classes: ClassVar = ("VideoLlavaForConditionalGeneration",)
    title: ClassVar = "Video-LLaVA"
    takes: ClassVar = "images, videos"
    towers: ClassVar = "CLIP and LanguageBind (with [CLS])"

    @property
    def modalities(self) -> tuple[Modality, ...]:
        image, video = super().modalities
        names = ("pixel_values", "pixel_values_images")  # the second until transformers 5.23
        return Modality("image", names, image.placeholder, "image"), video

    def tower(self, modality: Modality) -> Any:
        return self.base.image_tower if modality.name == "image" else self.base.video_tower

    def tokens(self, modality: Modality, output: Any, batch: Batch) -> list[Tensor]:
        features = output.pooler_output
        if modality.name == "video":
            features = features.unflatten(0, (-1, frames(batch))).flatten(1, 2)
        return list(features)

    def carry(self, modality: Modality, patches: Tensor, batch: Batch) -> list[Tensor]:
        views = patches.unflatten(0, (-1, self.n_patches))
        if modality.name == "video":
            views = F.pad(views, (0, 0, 1, 0), value=torch.nan)
            views = views.unflatten(0, (-1, frames(batch))).flatten(1, 2)
        return list(views)

    def grids(self, modality: Modality, lengths: Sequence[int], batch: Batch) -> list[Grid | None]:
        t = frames(batch) if modality.name == "video" else 1
        return [square(n, t) for n in lengths]
