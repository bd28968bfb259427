"""Base of strategies that merge before attention and use its map, merged, instead of a new one."""

from __future__ import annotations

from dataclasses import dataclass

from vtprune.strategies._blocks import InBlocks
from vtprune.types import Facts, Maps, Site, Stage


@dataclass(frozen=True)
class Ahead(InBlocks):
    """``one_step_ahead``: whether to merge the attention map of the block, too.

    Otherwise, and in the towers of language models, it acts at the end of a block.
    ``prop_attn``: whether a merged token gets attention for all patches it stands for.
    """

    one_step_ahead: bool = True
    prop_attn: bool = True

    @property
    def weighs(self) -> bool:
        return self.prop_attn

    def stage(self, layer: int, facts: Facts) -> Stage:
        return Stage(
            Site.ENCODER,
            self.read(layer, facts),
            layer,
            ahead=self.one_step_ahead and Maps in facts.signals,
            proportional=self.prop_attn,
        )
