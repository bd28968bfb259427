"""open_clip: its own vision tower; towers made of timm's are served as those are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import linear

from vtprune.errors import UnsupportedError
from vtprune.vit_adapters._base import ViTAdapter


class OpenClip(ViTAdapter):
    """Facts of open_clip's ``VisionTransformer``."""

    classes = ("open_clip.VisionTransformer",)
    block_types = ("ResidualAttentionBlock", "CustomResidualAttentionBlock")
    attention_types = ("MultiheadAttention", "Attention")
    takes = ("k_x", "v_x", "attn_mask")
    whole = ("forward_intermediates",)

    def _check(self) -> None:
        attentions = [self.attention(block) for block in self.blocks]
        if any(getattr(one, "logit_scale", None) is not None for one in attentions):
            raise UnsupportedError(
                "This tower attends by the cosine of queries and keys (scaled_cosine), which is "
                "not supported. Use one without."
            )
        if not self.tower.transformer.batch_first:
            raise UnsupportedError(
                "This tower has the batch second (batch_first=False). Load it with batch_first."
            )

    @property
    def blocks(self) -> Sequence[Any]:
        return self.tower.transformer.resblocks

    @property
    def n_prefix(self) -> int:
        return 1

    @property
    def has_cls(self) -> bool:
        return True

    @property
    def n_patches(self) -> int | None:
        height, width = self.tower.grid_size
        return height * width

    def attention(self, block: Any) -> Any:
        return block.attn

    def norm(self, block: Any, x: Tensor) -> Tensor:
        return block.ln_1(x)

    def project(self, attention: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parts = linear(x, attention.in_proj_weight, attention.in_proj_bias).chunk(3, dim=-1)
        heads = (attention.num_heads, -1)
        q, k, v = (part.unflatten(-1, heads).transpose(1, 2) for part in parts)
        if isinstance(attention, nn.MultiheadAttention):
            return q, k, v
        return attention.ln_q(q), attention.ln_k(k), v

    def dropout(self, attention: Any) -> float:
        own = isinstance(attention, nn.MultiheadAttention)
        return attention.dropout if own else attention.attn_drop.p

    def attended(self, block: Any, out: Tensor, x: Tensor) -> Tensor:
        attention = block.attn
        if isinstance(attention, nn.MultiheadAttention):
            return block.ls_1(attention.out_proj(out))
        if attention.head_scale is not None:
            heads = out.unflatten(-1, (attention.num_heads, -1))
            out = (heads * attention.head_scale[:, 0]).flatten(2)
        made = attention.out_drop(attention.out_proj(attention.ln_inner(out)))
        return block.ls_1(getattr(block, "ln_attn", nn.Identity())(made))

    def passed(self, block: Any, x: Tensor) -> Tensor:
        return block.ls_2(block.mlp(block.ln_2(x)))

    @property
    def means(self) -> tuple[tuple[Any, str], ...]:
        averaged = self.tower.pool_type == "avg" and self.tower.attn_pool is None
        return ((self.tower, "_global_pool"),) if averaged else ()

    @property
    def poolers(self) -> Mapping[nn.Module, str]:
        tower = self.tower
        if tower.attn_pool is None:
            return {}
        found = [tower.attn_pool]
        if tower.attn_pool_type == "parallel":  # in a cascade the second looks at the first
            found.append(tower.attn_pool_contrastive)
        return {pooler.attn: "key_padding_mask" for pooler in found}
