"""ToFu: in early blocks drop patches that have a twin, in later ones merge them at full length.

Patches are matched as by ToMe: those at even places of the sequence with the most similar one at an
odd place, by the cosine of their keys (mean over heads). Early on, where a model is far from linear
in its tokens, the first of a pair just leaves; later the two become their mean, as long as the
longest of them, since means alone shrink. arXiv 2312.01026 (a port is in hchautran/PiToMe). The
rest of the tower, the projector and the prefill run on fewer tokens. Every block takes equally many
away, so that ``keep`` is met exactly, repeatedly where halving is not enough; sizes count neither
in the mean nor in attention. Between blocks tokens wait in the order of ToMe, which decides the
halves of the next block. Where a visual token is made of several patches, projected tokens are
merged in one go, by the keys of the block that yields the features. Defaults: the paper.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vtprune.errors import ConfigError
from vtprune.scoring.matching import ascending, merge_down
from vtprune.scoring.norms import norm_preserving
from vtprune.strategies._blocks import InBlocks
from vtprune.types import Facts, Keys, Selection, Signals, TowerNeed


@dataclass(frozen=True)
class ToFu(InBlocks):
    """``layers`` are the blocks that it acts in, by default all up to that of the features.

    ``prune``: in which share of the blocks, from the first on, tokens are dropped; without blocks,
    in the one step if it is 1. ``compat`` as in the port: means are divided by the norm of the
    token at whose place they are, not by their own, and the block in the middle drops, too.
    """

    prune: float = 0.5
    compat: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.prune <= 1:
            raise ConfigError(f"prune={self.prune!r} must be a share from 0 to 1.")

    @property
    def weighs(self) -> bool:
        return False

    def read(self, layer: int, facts: Facts) -> tuple[TowerNeed, ...]:
        return (Keys(layer),)

    def select(self, signals: Signals, k: int) -> Selection:
        keys = signals.stack(Keys)[-1]  # [B, N, d]
        alike = torch.ones(keys.shape[:2], device=keys.device)
        rows, into = merge_down(keys, alike, k, signals.n_prefix)
        if signals.inside is None:
            rows, into = ascending(rows, into)
        if self.drops(signals):
            return Selection(rows, signals.n)
        return norm_preserving(rows, into, signals.tokens, self.compat)

    def drops(self, signals: Signals) -> bool:
        """Whether a stage drops tokens instead of merging them."""
        inside = signals.inside
        if inside is None:
            return self.prune == 1
        layer, early = inside.layers[inside.stage], self.prune * inside.depth
        return layer <= early if self.compat else layer < early
