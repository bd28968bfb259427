"""PaliGemma: a SigLIP tower, one token per patch; the whole prefix sees itself both ways."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from vtprune.types import Facts
from vtprune.vlm_adapters._base import Batch, Modality, VLMAdapter


class PaliGemma(VLMAdapter):
    """Position ids begin with 1. A last norm follows the tower's last block."""

    classes: ClassVar = ("PaliGemmaForConditionalGeneration",)
    title: ClassVar = "PaliGemma"
    towers: ClassVar = "SigLIP"
    first_position: ClassVar = 1

    @property
    def facts(self) -> Facts:
        vision = self.model.config.vision_config
        return Facts(
            vision_layers=vision.num_hidden_layers,
            feature_block=vision.num_hidden_layers - 1,
            has_cls=False,
            signals=Facts.signals_of(cls_row=False),
            n_tokens=(vision.image_size // vision.patch_size) ** 2,
            decoder_layers=self.model.config.text_config.num_hidden_layers,
            family=self.title,
        )

    def carry(self, modality: Modality, patches: Tensor, batch: Batch) -> list[Tensor]:
        vision = self.model.config.vision_config
        return list(patches.split((vision.image_size // vision.patch_size) ** 2))
