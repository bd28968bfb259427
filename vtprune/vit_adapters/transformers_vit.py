"""transformers: CLIP, SigLIP, ViT and DINOv2 encoders, with and without a head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from vtprune.vit_adapters._base import ViTAdapter


class TransformersViT(ViTAdapter):
    """Facts of transformers' encoders, which name the same parts differently."""

    classes = (
        *("transformers.CLIPVisionModel", "transformers.SiglipVisionModel"),
        *("transformers.ViTModel", "transformers.Dinov2Model"),
        "transformers.Dinov2WithRegistersModel",
    )
    block_types = (
        *("CLIPEncoderLayer", "SiglipEncoderLayer", "ViTLayer", "Dinov2Layer"),
        "Dinov2WithRegistersLayer",
    )
    attention_types = (
        *("CLIPAttention", "SiglipAttention", "ViTAttention", "Dinov2Attention"),
        "Dinov2WithRegistersAttention",
    )
    takes = ("attention_mask",)
    records = True

    @property
    def blocks(self) -> Sequence[Any]:
        encoder = getattr(self.tower, "encoder", self.tower)
        return encoder.layers if hasattr(encoder, "layers") else encoder.layer

    @property
    def n_prefix(self) -> int:
        return int(self.has_cls) + getattr(self.tower.config, "num_register_tokens", 0)

    @property
    def has_cls(self) -> bool:
        embeddings = self.tower.embeddings
        return hasattr(embeddings, "class_embedding") or hasattr(embeddings, "cls_token")

    @property
    def n_patches(self) -> int | None:
        size, patch = self.tower.config.image_size, self.tower.config.patch_size
        square = isinstance(size, int) and isinstance(patch, int)
        return (size // patch) ** 2 if square else None

    def attention(self, block: Any) -> Any:
        return _first(block, "self_attn", "attention")

    def norm(self, block: Any, x: Tensor) -> Tensor:
        return _first(block, "layer_norm1", "layernorm_before", "norm1")(x)

    def project(self, attention: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parts = [module(x) for module in (attention.q_proj, attention.k_proj, attention.v_proj)]
        heads = (-1, attention.head_dim)
        q, k, v = (part.unflatten(-1, heads).transpose(1, 2) for part in parts)
        return q, k, v

    def dropout(self, attention: Any) -> float:
        return _first(attention, "attention_dropout", "dropout")

    def attended(self, block: Any, out: Tensor, x: Tensor) -> Tensor:
        made = _first(self.attention(block), "o_proj", "out_proj")(out)
        return _added(block, made, "layer_scale1")

    def passed(self, block: Any, x: Tensor) -> Tensor:
        made = block.mlp(_first(block, "layer_norm2", "layernorm_after", "norm2")(x))
        return _added(block, made, "layer_scale2")

    @property
    def poolers(self) -> Mapping[nn.Module, str]:
        head = getattr(self.tower, "head", None)
        return {} if head is None else {head.attention: "key_padding_mask"}

    @property
    def averages_output(self) -> bool:
        name = type(self.model).__name__
        return name.endswith("ForImageClassification") and not name.startswith("ViT")


def _first(module: Any, *names: str) -> Any:
    return next(getattr(module, name) for name in names if hasattr(module, name))


def _added(block: Any, made: Tensor, scale: str) -> Tensor:
    """Returns what a half adds, scaled and with the dropout that its family has."""
    if hasattr(block, scale):
        made = getattr(block, scale)(made)
    for name in ("dropout", "drop_path"):
        if hasattr(block, name):
            made = getattr(block, name)(made)
    return made
