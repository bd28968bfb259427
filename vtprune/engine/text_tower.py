"""CLIP's text tower, which a vision tower without one needs to know what the instruction says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vtprune.errors import ConfigError, UnsupportedError

_CLIP = "clip_vision_model"


class TextTower:
    """Patches and texts in the space that both towers of a CLIP share.

    Args:
        given: the CLIP that the vision tower was taken from, a ``CLIPModel``, and its tokenizer.
        model: the vision-language model whose patches it is for.

    Raises:
        ConfigError: something else was given.
        UnsupportedError: the model's tower is no CLIP, or one of another width.
    """

    def __init__(self, given: Any, model: PreTrainedModel) -> None:
        try:
            self.clip, self.tokenizer = given
            vision, text = self.clip.config.vision_config, self.clip.config.text_config
            self.length: int = text.max_position_embeddings
        except (TypeError, ValueError, AttributeError) as error:
            raise ConfigError(
                f"text_encoder={type(given).__name__}: give a pair, the CLIPModel that the vision "
                "tower was taken from and its tokenizer."
            ) from error
        tower: Any = getattr(model.config, "vision_config", None)
        if getattr(tower, "model_type", "") != _CLIP or tower.hidden_size != vision.hidden_size:
            raise UnsupportedError(
                f"text_encoder goes with a CLIP tower of its own width, {vision.hidden_size}; "
                f"{type(model).__name__} has a {getattr(tower, 'model_type', 'tower')!r} of width "
                f"{getattr(tower, 'hidden_size', 'unknown')}. Leave text_encoder out."
            )

    @torch.no_grad()
    def patches(self, hidden: Tensor) -> Tensor:
        """Projects outputs of a block of the vision tower, ``[..., C]`` -> ``[..., d]`` float32."""
        weight = self.clip.visual_projection.weight
        normed = self.clip.vision_model.post_layernorm(hidden.to(weight.device, weight.dtype))
        return self.clip.visual_projection(normed).to(hidden.device, torch.float32)

    @torch.no_grad()
    def words(self, texts: Sequence[str]) -> list[Tensor]:
        """Embeds texts, each cut into as many pieces as its length takes, ``[M, d]`` float32."""
        weight = self.clip.text_projection.weight
        embedded = []
        for text in texts:
            ids = torch.tensor(self.tokenizer(text)["input_ids"])
            padded = ids.new_zeros(-(-len(ids) // self.length) * self.length)
            padded[: len(ids)] = ids
            mask = (torch.arange(len(padded)) < len(ids)).long()
            pieces = (x.view(-1, self.length).to(weight.device) for x in (padded, mask))
            pooled = self.clip.text_model(*pieces).pooler_output
            embedded.append(self.clip.text_projection(pooled).float())
        return embedded
