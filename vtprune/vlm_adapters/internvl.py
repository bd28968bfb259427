"""InternVL 3: square tiles, a tower with [CLS], 2 x 2 patches shuffled into one token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from vtprune.errors import UnsupportedError
from vtprune.types import Facts
from vtprune.vlm_adapters._base import Batch, Modality, VLMAdapter
from vtprune.vlm_adapters._clip import feature_block


class InternVL(VLMAdapter):
    """An item is a tile or a video frame, as the model has them. Videos are images to it."""

    classes: ClassVar = ("InternVLForConditionalGeneration",)
    title: ClassVar = "InternVL"
    takes: ClassVar = "images, videos"
    towers: ClassVar = "InternViT (with [CLS])"
    fixed: ClassVar = ("vision_feature_layer", "vision_feature_select_strategy")
    item: ClassVar = "tile"

    @property
    def facts(self) -> Facts:
        config = self.model.config
        if config.vision_feature_select_strategy != "default":
            raise UnsupportedError(
                f"vision_feature_select_strategy={config.vision_feature_select_strategy!r} mixes "
                "[CLS] into the tokens; use 'default'."
            )
        vision = config.vision_config
        high, wide = (s // p for s, p in zip(vision.image_size, vision.patch_size, strict=True))
        return Facts(
            vision_layers=vision.num_hidden_layers,
            feature_block=feature_block(config.vision_feature_layer, vision.num_hidden_layers),
            has_cls=True,
            signals=Facts.signals_of(cls_row=True),
            n_tokens=int(high * config.downsample_ratio) * int(wide * config.downsample_ratio),
            decoder_layers=config.text_config.num_hidden_layers,
            in_tower=False,
            family=self.title,
        )

    def blocks(self, modality: Modality) -> Sequence[nn.Module]:
        return self.base.vision_tower.encoder.layer

    def attention(self, modality: Modality, layer: int) -> nn.Module:
        return self.base.vision_tower.encoder.layer[layer].attention

    def carry(self, modality: Modality, patches: Tensor, batch: Batch) -> list[Tensor]:
        ratio = self.model.config.downsample_ratio
        n = round(self.facts.n_tokens / ratio**2)
        side = round(n**0.5)
        tiles = patches.unflatten(0, (-1, side, side))
        shuffled = self.base.pixel_shuffle(tiles, scale_factor=ratio).flatten(1, 2)
        return list(shuffled.unflatten(2, (-1, patches.shape[1])).mean(2))
