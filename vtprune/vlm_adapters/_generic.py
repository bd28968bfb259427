"""Families without a file of their own, and those that no adapter can serve."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from vtprune.errors import UnsupportedError
from vtprune.needs import INSIDE
from vtprune.types import Facts, InstructionText
from vtprune.vlm_adapters._base import Batch, Grid, Modality, VLMAdapter

_QUERIES = (
    "its Q-Former hands over a few queries instead of patches, so there is nothing to prune. Use a "
    "model whose visual tokens are patches, such as LLaVA or Qwen2.5-VL."
)
# Class -> why.
REFUSED = {
    "MllamaForConditionalGeneration": (
        "images reach it through cross-attention, not as tokens of the prompt. Use a model that "
        "puts them into the prompt, such as LLaVA or Qwen2.5-VL."
    ),
    "Blip2ForConditionalGeneration": _QUERIES,
    "InstructBlipForConditionalGeneration": _QUERIES,
    "InstructBlipVideoForConditionalGeneration": _QUERIES,
}


class Generic(VLMAdapter):
    """Takes encoder outputs by transformers' contract and knows nothing of the tower.

    It serves strategies that read no signal of the tower. Every visual token is a candidate.
    """

    @property
    def facts(self) -> Facts:
        name = type(self.model).__name__
        if getattr(self.model.config, "image_token_id", None) is None:
            raise UnsupportedError(
                f"{name} has no adapter, and its configuration names no image_token_id, so its "
                "visual tokens cannot be found in a prompt."
            )
        text: Any = self.model.config.get_text_config()
        return Facts(
            vision_layers=0,
            feature_block=0,
            has_cls=False,
            signals=frozenset({InstructionText, *INSIDE}),
            decoder_layers=text.num_hidden_layers if hasattr(self.language_model, "layers") else 0,
            in_tower=False,
            mrope=hasattr(self.base, "compute_3d_position_ids"),
            family=f"{name} (no adapter of its own)",
        )

    @property
    def modalities(self) -> tuple[Modality, ...]:
        config: Any = self.model.config
        every = super().modalities if hasattr(config, "video_token_id") else ()
        image = Modality("image", ("pixel_values",), config.image_token_id, "image")
        return every or (image,)

    def tower(self, modality: Modality) -> Any:
        return self.language_model  # nothing is tapped in the tower

    def carry(self, modality: Modality, patches: Tensor, batch: Batch) -> list[Tensor]:
        raise UnsupportedError(f"{self.facts.family} gives no signal of its tower.")

    def tokens(self, modality: Modality, output: Any, batch: Batch) -> list[Tensor]:
        features = output.pooler_output
        if isinstance(features, Tensor) and features.ndim != 3:
            raise UnsupportedError(
                f"{type(self.model).__name__} has no adapter, and its visual tokens come as a "
                f"tensor of shape {tuple(features.shape)}, in which images cannot be told apart."
            )
        return list(features)

    def grids(self, modality: Modality, lengths: Sequence[int], batch: Batch) -> list[Grid | None]:
        return [None] * len(lengths)
