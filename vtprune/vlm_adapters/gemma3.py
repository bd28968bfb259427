"""Gemma 3: a SigLIP tower, patches pooled to 256 tokens, which see each other both ways."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from vtprune.types import Facts
from vtprune.vlm_adapters._base import Batch, Modality, VLMAdapter


class Gemma3(VLMAdapter):
    """The model's own pooling carries values from patches to tokens."""

    classes: ClassVar = ("Gemma3ForConditionalGeneration",)
    title: ClassVar = "Gemma 3"
    towers: ClassVar = "SigLIP"

    @property
    def facts(self) -> Facts:
        config = self.model.config
        depth = config.vision_config.num_hidden_layers
        return Facts(
            vision_layers=depth,
            feature_block=depth - 1,
            has_cls=False,
            signals=Facts.signals_of(cls_row=False),
            n_tokens=config.mm_tokens_per_image,
            decoder_layers=config.text_config.num_hidden_layers,
            in_tower=False,
            family=self.title,
        )

    def carry(self, modality: Modality, patches: Tensor, batch: Batch) -> list[Tensor]:
        projector = self.base.multi_modal_projector
        side = projector.patches_per_image
        images = patches.unflatten(0, (-1, side, side)).permute(0, 3, 1, 2)
        return list(projector.avg_pool(images).flatten(2).mT)
