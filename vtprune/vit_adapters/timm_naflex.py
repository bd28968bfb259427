"""timm: NaFlexVit on plain images; patches with padding come with a mask, which is refused."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vtprune.vit_adapters.timm_eva import TimmEva
from vtprune.vit_adapters.timm_vit import TimmViT


class TimmNaFlex(TimmEva):
    """Facts of ``NaFlexVit``, which has blocks of either kind."""

    classes = ("timm.NaFlexVit",)
    block_types = (*TimmViT.block_types, *TimmEva.block_types)
    attention_types = (*TimmViT.attention_types, *TimmEva.attention_types)

    @property
    def has_cls(self) -> bool:
        return self.tower.embeds.cls_token is not None

    @property
    def n_patches(self) -> int | None:
        return None

    def attended(self, block: Any, out: Tensor, x: Tensor) -> Tensor:
        kind = TimmEva if hasattr(block, "gamma_1") else TimmViT
        return kind.attended(self, block, out, x)

    def passed(self, block: Any, x: Tensor) -> Tensor:
        kind = TimmEva if hasattr(block, "gamma_1") else TimmViT
        return kind.passed(self, block, x)

    @property
    def means(self) -> tuple[tuple[Any, str], ...]:
        return ((self.tower, "_pool"),) if self.tower.global_pool == "avg" else ()
