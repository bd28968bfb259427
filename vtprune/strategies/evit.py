"""EViT: in three blocks keep the patches that [CLS] attends to most and fuse the others into one.

Between attention and MLP of the 4th, 7th and 10th of 12 blocks; the new token is the sum of what
leaves, weighted by attention and undivided, and from then on one like any other. arXiv 2202.07800
(youweiliang/evit). The rest of the tower, the projector and the prefill run on fewer tokens. Every
stage keeps the same share of what reaches it, the one by which ``keep`` is what is left after the
last, its fused token counted; the authors' share 0.7 is 71 of 196 patches. Tokens stay in the order
of the image, the fused one last, which counts for one patch; after the tower it is at the first
place that is free. A tower without [CLS] ranks by attention received. Where a visual token is made
of several patches, it happens once, to projected tokens, by the block that yields the features.
Defaults: official code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vtprune.kernels.topk_sorted import topk_sorted
from vtprune.scoring.attention import salience_needs
from vtprune.scoring.diversity import outside
from vtprune.scoring.rates import thinned
from vtprune.selection import Mix
from vtprune.strategies._blocks import InBlocks
from vtprune.types import Budget, ClsRow, Facts, Received, Selection, Signals, TowerNeed


@dataclass(frozen=True)
class EViT(InBlocks):
    """``layers`` are the blocks that it acts in, by default 3, 6 and 9 of 12.

    ``fuse``: whether what leaves a block becomes a token; or else it is gone.
    """

    fuse: bool = True

    @property
    def weighs(self) -> bool:
        return False

    def default_layers(self, facts: Facts) -> tuple[int, ...]:
        if not facts.in_tower:
            return super().default_layers(facts)
        return tuple(sorted({min(facts.scale(i, 12), facts.feature_block) for i in (3, 6, 9)}))

    def read(self, layer: int, facts: Facts) -> tuple[TowerNeed, ...]:
        return salience_needs((layer,), facts)

    def counts(self, signals: Signals, budget: Budget) -> list[int]:
        inside = signals.inside
        if inside is None:
            return super().counts(signals, budget)
        stages, new = len(inside.layers), int(self.fuse)
        left = [thinned(n, budget.count(n), stages, new)[inside.stage] for n in inside.entered]
        return [min(signals.n, count) for count in left]

    def select(self, signals: Signals, k: int) -> Selection:
        score, n = signals.stack(ClsRow, Received)[-1], signals.n  # [B, N]
        if not self.fuse:
            return Selection(topk_sorted(score, k), n)
        kept = topk_sorted(score, k - 1)
        others = outside(kept, n)
        place = torch.arange(k - 1, device=kept.device).expand_as(kept)
        size = torch.ones_like(score) if signals.size is None else signals.size
        share = score.float().nan_to_num(0.0, 0.0, 0.0).gather(1, others)
        return Selection(
            torch.cat([kept, kept.new_full((len(kept), 1), -1)], dim=1),
            n,
            Mix(
                torch.cat([kept, others], dim=1),
                torch.cat([place, torch.full_like(others, k - 1)], dim=1),
                torch.cat([torch.ones_like(kept, dtype=share.dtype), share], dim=1),
            ),
            torch.cat([size.gather(1, kept), size.new_ones(len(kept), 1)], dim=1),
        )
