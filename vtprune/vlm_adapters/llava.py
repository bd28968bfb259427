"""LLaVA-1.5 and its kin: one projected feature map per image, CLIP or SigLIP tower."""

from __future__ import annotations

import math
from typing import ClassVar

from torch import nn
from transformers import PreTrainedModel

from vtprune.errors import UnsupportedError
from vtprune.types import Facts
from vtprune.vlm_adapters._base import VLMAdapter

# Tower type -> (has a CLS token, the feature selection that yields the patches and only them).
TOWERS = {"clip_vision_model": (True, "default"), "siglip_vision_model": (False, "full")}


class Llava(VLMAdapter):
    """``LlavaForConditionalGeneration``: features are the output of block ``n + feature_layer``."""

    classes: ClassVar = ("LlavaForConditionalGeneration",)
    fixed: ClassVar = ("vision_feature_layer", "vision_feature_select_strategy", "image_sizes")

    @property
    def facts(self) -> Facts:
        config, vision = self.model.config, self.model.config.vision_config
        if vision.model_type not in TOWERS:
            raise UnsupportedError(
                f"LLaVA with a {vision.model_type!r} tower is not supported; "
                f"supported towers: {', '.join(TOWERS)}."
            )
        has_cls, select = TOWERS[vision.model_type]
        if config.vision_feature_select_strategy != select:
            raise UnsupportedError(
                f"vision_feature_select_strategy={config.vision_feature_select_strategy!r} with a "
                f"{vision.model_type} does not yield exactly the patches; use {select!r}."
            )
        layer, depth = config.vision_feature_layer, vision.num_hidden_layers
        if not isinstance(layer, int):
            raise UnsupportedError(
                f"vision_feature_layer={layer}: features of several layers are joined before the "
                "projector, so no single block yields them. Use a model with one feature layer."
            )
        block = depth + layer if layer < 0 else layer - 1
        if not 0 <= block < depth:
            raise UnsupportedError(f"vision_feature_layer={layer} names no block of {depth}.")
        side = vision.image_size // vision.patch_size
        return Facts(
            vision_layers=depth,
            feature_block=block,
            has_cls=has_cls,
            signals=Facts.signals_of(cls_row=has_cls),
            n_tokens=side * side,
            decoder_layers=config.text_config.num_hidden_layers,
            family=f"LLaVA ({vision.model_type})",
        )

    @property
    def placeholder(self) -> int:
        return self.model.config.image_token_id

    @property
    def tower(self) -> PreTrainedModel:
        return self.base.vision_tower

    def block(self, layer: int) -> nn.Module:
        return self.base.vision_tower.encoder.layers[layer]

    def attention(self, layer: int) -> nn.Module:
        return self.base.vision_tower.encoder.layers[layer].self_attn

    def grid(self, n: int) -> tuple[int, int, int] | None:
        side = math.isqrt(n)
        return (1, side, side) if side * side == n else None
