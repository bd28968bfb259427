"""SmolVLM and Idefics3: square tiles of a SigLIP tower, several patches shuffled into one token."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from vtprune.types import Facts
from vtprune.vlm_adapters._base import Batch, Modality, VLMAdapter


class SmolVLM(VLMAdapter):
    """An item is a tile; the marks between tiles are text and stay. Videos are images to it."""

    classes: ClassVar = ("SmolVLMForConditionalGeneration", "Idefics3ForConditionalGeneration")
    title: ClassVar = "SmolVLM, Idefics3"
    takes: ClassVar = "images, videos"
    towers: ClassVar = "SigLIP"
    item: ClassVar = "tile"

    @property
    def facts(self) -> Facts:
        depth = self.model.config.vision_config.num_hidden_layers
        return Facts(
            vision_layers=depth,
            feature_block=depth - 1,
            has_cls=False,
            signals=Facts.signals_of(cls_row=False),
            n_tokens=self.base.image_seq_len,
            decoder_layers=self.model.config.text_config.num_hidden_layers,
            in_tower=False,
            family=self.title,
        )

    @property
    def modalities(self) -> tuple[Modality, ...]:
        return super().modalities[:1]

    def tower(self, modality: Modality) -> Any:
        return self.base.vision_model

    def tokens(self, modality: Modality, output: Any, batch: Batch) -> list[Tensor]:
        return list(torch.cat(list(output.pooler_output)).split(self.base.image_seq_len))

    def carry(self, modality: Modality, patches: Tensor, batch: Batch) -> list[Tensor]:
        connector = self.base.connector
        n = self.base.image_seq_len * connector.scale_factor**2
        tiles = patches.unflatten(0, (-1, n))
        shuffled = connector.pixel_shuffle(tiles, connector.scale_factor)
        return list(shuffled.unflatten(2, (-1, patches.shape[1])).mean(2))
