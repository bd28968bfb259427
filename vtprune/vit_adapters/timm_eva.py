"""timm: Eva, among them EVA-02, DINOv3, Perception Encoder and the ViTs with a rotary embedding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from vtprune.vit_adapters.timm_vit import TimmViT


class TimmEva(TimmViT):
    """Facts of ``Eva``."""

    classes = ("timm.Eva",)
    block_types = ("EvaBlock",)
    attention_types = ("EvaAttention", "AttentionRope")
    takes = ("rope", "attn_mask", "is_causal")
    whole = ("forward_intermediates",)

    @property
    def n_patches(self) -> int | None:
        return None if self.tower.dynamic_img_size else self.tower.patch_embed.num_patches

    def project(self, attention: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        size = (-1, attention.head_dim)
        if attention.qkv is None:
            parts = [m(x) for m in (attention.q_proj, attention.k_proj, attention.v_proj)]
        else:
            parts = self._fused(attention, x).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, size).transpose(1, 2) for part in parts)
        q, k = attention.q_norm(q), attention.k_norm(k)
        groups = getattr(attention, "num_kv_groups", 1)
        if groups > 1:
            k, v = (part.repeat_interleave(groups, dim=1) for part in (k, v))
        return q, k, v

    @staticmethod
    def _fused(attention: Any, x: Tensor) -> Tensor:
        if getattr(attention, "q_bias", None) is None:
            return attention.qkv(x)
        bias = torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])
        return linear(x, attention.qkv.weight, bias)

    def turn(self, attention: Any, x: Tensor, rope: Tensor) -> Tensor:
        from timm.layers.pos_embed_sincos import apply_rot_embed_cat  # an extra

        p, half = attention.num_prefix_tokens, getattr(attention, "rotate_half", False)
        turned = apply_rot_embed_cat(x[:, :, p:], rope, half=half)
        return torch.cat([x[:, :, :p], turned], dim=2).type_as(x)

    def attended(self, block: Any, out: Tensor, x: Tensor) -> Tensor:
        made = self._joined(block.attn, out, x)
        return block.drop_path1(made if block.gamma_1 is None else block.gamma_1 * made)

    def passed(self, block: Any, x: Tensor) -> Tensor:
        made = block.mlp(block.norm2(x))
        return block.drop_path2(made if block.gamma_2 is None else block.gamma_2 * made)
