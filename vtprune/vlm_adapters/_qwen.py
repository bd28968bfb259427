"""Qwen-VLs: images of any size, 2 x 2 patches merged into a token, position ids with three axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from vtprune.types import Facts
from vtprune.vlm_adapters._base import Batch, Grid, Modality, VLMAdapter


class QwenVL(VLMAdapter):
    """Patches come grouped by token, so a token's value is the mean of ``merge ** 2`` in a row."""

    towers: ClassVar = "Qwen's own (no [CLS])"
    takes: ClassVar = "images, videos"

    @property
    def facts(self) -> Facts:
        depth = len(self.base.visual.blocks)
        return Facts(
            vision_layers=depth,
            feature_block=depth - 1,
            has_cls=False,
            signals=Facts.signals_of(cls_row=False),
            decoder_layers=self.model.config.text_config.num_hidden_layers,
            first_stage=max(1, self.n_planes),
            full_blocks=self.full_blocks,
            in_tower=False,
            mrope=True,
            family=self.title,
        )

    @property
    def full_blocks(self) -> tuple[int, ...] | None:
        """Blocks whose attention spans a whole frame, None = all."""
        return None

    @property
    def n_planes(self) -> int:
        """First layers of the language model that get visual features of their own."""
        return 0

    def tower(self, modality: Modality) -> Any:
        return self.base.visual

    def blocks(self, modality: Modality) -> Sequence[nn.Module]:
        return self.base.visual.blocks

    def attention(self, modality: Modality, layer: int) -> nn.Module:
        return self.base.visual.blocks[layer].attn

    def sizes(self, modality: Modality, batch: Batch) -> Tensor:
        """Returns patches in time, height and width of each item, ``[I, 3]``."""
        return batch[f"{modality.name}_grid_thw"]

    def segments(self, modality: Modality, batch: Batch) -> list[int]:
        return [h * w for t, h, w in self.sizes(modality, batch).tolist() for _ in range(t)]

    def merge(self, modality: Modality, patches: Tensor, batch: Batch) -> Tensor:
        """Returns the values of all tokens, ``[sum of n_i, C]``, in the order of the prompt."""
        return patches.unflatten(0, (-1, self.base.visual.spatial_merge_size**2)).mean(1)

    def carry(self, modality: Modality, patches: Tensor, batch: Batch) -> list[Tensor]:
        lengths = [t * h * w for t, h, w in self.grids(modality, (), batch)]
        return list(self.merge(modality, patches, batch).split(lengths))

    def grids(self, modality: Modality, lengths: Sequence[int], batch: Batch) -> list[Any]:
        side = self.base.visual.spatial_merge_size
        sizes: list[Grid] = self.sizes(modality, batch).tolist()
        return [(t, h // side, w // side) for t, h, w in sizes]
