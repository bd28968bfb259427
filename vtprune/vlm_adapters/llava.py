"""LLaVA-1.5 and its kin: one projected feature map per image."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from vtprune.vlm_adapters._base import Batch, Modality
from vtprune.vlm_adapters._clip import ClipLike


class Llava(ClipLike):
    """Every patch of the tower is one visual token."""

    classes: ClassVar = ("LlavaForConditionalGeneration",)
    title: ClassVar = "LLaVA-1.5"
    fixed: ClassVar = (*ClipLike.fixed, "image_sizes")

    @property
    def n_tokens(self) -> int:
        return self.n_patches

    def carry(self, modality: Modality, patches: Tensor, batch: Batch) -> list[Tensor]:
        return list(patches.split(self.n_patches))
