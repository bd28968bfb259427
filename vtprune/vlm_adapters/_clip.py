"""What LLaVA and its descendants share: a CLIP or SigLIP tower and one feature layer."""

from __future__ import annotations

from typing import Any, ClassVar

from vtprune.errors import UnsupportedError
from vtprune.types import Facts
from vtprune.vlm_adapters._base import VLMAdapter

# Tower type -> (has a CLS token, the feature selection that yields the patches and only them).
TOWERS = {"clip_vision_model": (True, "default"), "siglip_vision_model": (False, "full")}


class ClipLike(VLMAdapter):
    """Features are the output of block ``n + feature_layer``, which a projector maps row by row.

    ``in_tower`` says that every visual token is one patch.
    """

    towers: ClassVar = "CLIP (with [CLS]), SigLIP"
    in_tower: ClassVar[bool] = True
    fixed: ClassVar = ("vision_feature_layer", "vision_feature_select_strategy")

    @property
    def facts(self) -> Facts:
        config: Any = self.model.config
        kind = config.vision_config.model_type
        if kind not in TOWERS:
            raise UnsupportedError(
                f"{self.title} with a {kind!r} tower is not supported; "
                f"supported towers: {', '.join(TOWERS)}."
            )
        has_cls, select = TOWERS[kind]
        if config.vision_feature_select_strategy != select:
            raise UnsupportedError(
                f"vision_feature_select_strategy={config.vision_feature_select_strategy!r} with a "
                f"{kind} does not yield exactly the patches; use {select!r}."
            )
        depth = config.vision_config.num_hidden_layers
        return Facts(
            vision_layers=depth,
            feature_block=feature_block(config.vision_feature_layer, depth),
            has_cls=has_cls,
            signals=Facts.signals_of(cls_row=has_cls),
            n_tokens=self.n_tokens,
            decoder_layers=config.text_config.num_hidden_layers,
            in_tower=self.in_tower,
            family=f"{self.title} ({kind})",
        )

    @property
    def n_patches(self) -> int:
        """Patches of one image or tile."""
        vision: Any = self.model.config.vision_config
        return (vision.image_size // vision.patch_size) ** 2

    @property
    def n_tokens(self) -> int | None:
        """Visual tokens of every image, or None where they depend on the image."""
        return None


def feature_block(layer: Any, depth: int) -> int:
    """Returns the 0-based block of ``depth`` whose output is ``hidden_states[layer]``.

    Raises:
        UnsupportedError: several layers, or one that is no block's output.
    """
    if not isinstance(layer, int):
        raise UnsupportedError(
            f"vision_feature_layer={layer}: features of several layers are joined before the "
            "projector, so no single block yields them. Use a model with one feature layer."
        )
    block = depth + layer if layer < 0 else layer - 1
    if not 0 <= block < depth:
        raise UnsupportedError(f"vision_feature_layer={layer} names no block of {depth}.")
    return block
