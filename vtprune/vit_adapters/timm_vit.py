"""timm: VisionTransformer, among them DeiT, DeiT-III, DINOv2, CLIP and SigLIP towers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from vtprune.errors import UnsupportedError
from vtprune.vit_adapters._base import ViTAdapter


class TimmViT(ViTAdapter):
    """Facts of ``VisionTransformer``."""

    classes = ("timm.VisionTransformer", "timm.VisionTransformerDistilled")
    block_types = ("Block",)
    attention_types = ("Attention",)
    takes = ("attn_mask", "is_causal")
    whole = ("forward_intermediates", "get_intermediate_layers")

    def _check(self) -> None:
        tower = self.tower
        pooler = getattr(tower, "attn_pool", None)
        odd = pooler is not None and (
            type(pooler).__name__ != "AttentionPoolLatent" or pooler.pos_embed is not None
        )
        if odd or tower.global_pool == "avgmax":
            raise UnsupportedError(
                f"{type(tower).__name__} pools by {type(pooler).__name__ if odd else 'avgmax'}, "
                "which cannot count a merged token as several. Build it with global_pool='token', "
                "'avg' or 'map'."
            )

    @property
    def blocks(self) -> Sequence[Any]:
        return self.tower.blocks

    @property
    def n_prefix(self) -> int:
        return self.tower.num_prefix_tokens

    @property
    def has_cls(self) -> bool:
        return getattr(self.tower, "cls_token", None) is not None

    @property
    def n_patches(self) -> int | None:
        stem = self.tower.patch_embed
        fixed = getattr(stem, "strict_img_size", False) and not self.tower.dynamic_img_size
        return stem.num_patches if fixed else None

    def attention(self, block: Any) -> Any:
        return block.attn

    def norm(self, block: Any, x: Tensor) -> Tensor:
        return block.norm1(x)

    def project(self, attention: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads = (3, attention.num_heads, attention.head_dim)
        q, k, v = attention.qkv(x).unflatten(-1, heads).permute(2, 0, 3, 1, 4).unbind(0)
        return attention.q_norm(q), attention.k_norm(k), v

    def attended(self, block: Any, out: Tensor, x: Tensor) -> Tensor:
        made = block.ls1(self._joined(block.attn, out, x))
        return block.drop_path1(made)

    @staticmethod
    def _joined(attention: Any, out: Tensor, x: Tensor) -> Tensor:
        out = attention.norm(out)
        if getattr(attention, "gate", None) is not None:
            out = out * attention.gate(x).sigmoid()
        return attention.proj_drop(attention.proj(out))

    def passed(self, block: Any, x: Tensor) -> Tensor:
        return block.drop_path2(block.ls2(block.mlp(block.norm2(x))))

    @property
    def means(self) -> tuple[tuple[Any, str], ...]:
        return ((self.tower, "pool"),) if self.tower.global_pool == "avg" else ()

    @property
    def mean_has_prefix(self) -> bool:
        return getattr(self.tower, "pool_include_prefix", False)

    @property
    def poolers(self) -> Mapping[nn.Module, str]:
        pooler = getattr(self.tower, "attn_pool", None)
        return {} if pooler is None else {pooler: "attn_mask"}
