"""ToMe: in every block of the tower merge the patches whose keys are most alike.

Between attention and MLP patches at even places of the sequence look for the most similar one at an
odd place, by the cosine of their keys (mean over heads); the best pairs become one token, a mean
weighted by the patches that each stands for, and later blocks give it attention for all of them.
arXiv 2210.09461 (facebookresearch/ToMe). The rest of the tower, the projector and the prefill run
on fewer tokens. Every block merges equally many, so that ``keep`` is met exactly; where halving is
not enough for that, the first block merges repeatedly. Between blocks tokens wait in the official
order, those at even places first, which decides the halves of the next block; what leaves the tower
is, unlike there, back in the order of the image, each token at the place that was merged into.
Where a visual token is made of several patches, projected tokens are merged in one go, by the keys
of the block that yields the features. Defaults: official code.
"""

from __future__ import annotations

from dataclasses import dataclass

from vtprune.strategies._blocks import InBlocks, merged_by_keys
from vtprune.types import Facts, Keys, Selection, Signals, TowerNeed


@dataclass(frozen=True)
class ToMe(InBlocks):
    """``layers`` are the blocks that merge, by default all up to the one that yields the features.

    ``prop_attn``: whether a merged token gets attention for all patches it stands for.
    """

    prop_attn: bool = True

    @property
    def weighs(self) -> bool:
        return self.prop_attn

    def read(self, layer: int, facts: Facts) -> tuple[TowerNeed, ...]:
        return (Keys(layer),)

    def select(self, signals: Signals, k: int) -> Selection:
        return merged_by_keys(signals, k)
