"""Mistral 3: Pixtral's tower, images of any size in one sequence, 2 x 2 patches merged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from vtprune.types import Facts
from vtprune.vlm_adapters._base import Batch, Modality, VLMAdapter
from vtprune.vlm_adapters._clip import feature_block


class Mistral3(VLMAdapter):
    """The marks that end rows and images are text and stay."""

    classes: ClassVar = ("Mistral3ForConditionalGeneration",)
    title: ClassVar = "Mistral 3"
    towers: ClassVar = "Pixtral (no [CLS])"
    fixed: ClassVar = ("vision_feature_layer",)

    @property
    def facts(self) -> Facts:
        config = self.model.config
        depth = config.vision_config.num_hidden_layers
        return Facts(
            vision_layers=depth,
            feature_block=feature_block(config.vision_feature_layer, depth),
            has_cls=False,
            signals=Facts.signals_of(cls_row=False),
            decoder_layers=config.text_config.num_hidden_layers,
            in_tower=False,
            family=self.title,
        )

    def blocks(self, modality: Modality) -> Sequence[nn.Module]:
        return self.base.vision_tower.transformer.layers

    def attention(self, modality: Modality, layer: int) -> nn.Module:
        return self.base.vision_tower.transformer.layers[layer].attention

    def sizes(self, batch: Batch) -> list[tuple[int, int]]:
        """Returns rows and columns of patches of each image."""
        patch = self.base.vision_tower.patch_size
        return [(int(h) // patch, int(w) // patch) for h, w in batch["image_sizes"]]

    def segments(self, modality: Modality, batch: Batch) -> list[int]:
        return [h * w for h, w in self.sizes(batch)]

    def carry(self, modality: Modality, patches: Tensor, batch: Batch) -> list[Tensor]:
        side = self.model.config.spatial_merge_size
        images = patches.split(self.segments(modality, batch))
        return [
            image.view(h // side, side, w // side, side, -1).mean((1, 3)).flatten(0, 1)
            for image, (h, w) in zip(images, self.sizes(batch), strict=True)
        ]

    def grids(self, modality: Modality, lengths: Sequence[int], batch: Batch) -> list[Any]:
        side = self.model.config.spatial_merge_size
        return [(1, h // side, w // side) for h, w in self.sizes(batch)]
