"""Qwen2.5-VL: most blocks of the tower see windows, and tokens wait in the order of these."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from transformers.vision_utils import get_vision_window_index

from vtprune.vlm_adapters._base import Batch, Modality
from vtprune.vlm_adapters._qwen import QwenVL


class Qwen2_5VL(QwenVL):
    """Only blocks with full attention give signals."""

    classes: ClassVar = ("Qwen2_5_VLForConditionalGeneration",)
    title: ClassVar = "Qwen2.5-VL"

    @property
    def full_blocks(self) -> tuple[int, ...]:
        return tuple(self.base.visual.fullatt_block_indexes)

    def merge(self, modality: Modality, patches: Tensor, batch: Batch) -> Tensor:
        tower = self.base.visual
        order, _ = get_vision_window_index(
            self.sizes(modality, batch),
            spatial_merge_size=tower.spatial_merge_size,
            window_size=tower.window_size,
            patch_size=tower.patch_size,
        )
        return super().merge(modality, patches, batch)[order.argsort().to(patches.device)]
