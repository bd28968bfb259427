"""MAELRE: while an image is long, merge a share of its patches in every block, and its attention.

As long as an image has more patches than are to stay, each block merges a share of them before its
attention, of which only the map among all that enter is computed: it is merged with the tokens,
columns added up and rows averaged, and stands for the attention of what is left. Once the image is
short enough, all later blocks attend exactly and merge nothing. Patches at even places of the
sequence look for the most similar one at an odd place, by the cosine of their keys (mean over
heads), as in ToMe; the mean is weighted by the patches that each token stands for. This is the
project's own reading of the abstract of MAELRE (progressive token merging with attention
approximation on long inputs, full attention once short), whose text and code could not be found,
and without the training that it speaks of. In the tower of a language model, which gives no
attention maps, tokens merge at the end of a block. ``keep`` is what is left in the end, exactly:
blocks merge a larger share where theirs would not lead there. Where a visual token is made of
several patches, projected tokens are merged in one go. Defaults: the project's own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from vtprune.errors import ConfigError
from vtprune.strategies._ahead import Ahead
from vtprune.strategies._blocks import merged_by_keys
from vtprune.types import Budget, Facts, Keys, Selection, Signals, TowerNeed


@dataclass(frozen=True)
class MAELRE(Ahead):
    """``layers`` are the blocks that may merge, by default all up to that of the features.

    ``share``: of the patches there are, how many a block merges. ``one_step_ahead``: whether to
    merge the attention map of the block, where the model gives it, instead of merging at its end.
    ``prop_attn``: whether a merged token gets attention for all patches it stands for.
    """

    share: float = 0.2

    def __post_init__(self) -> None:
        if not 0 < self.share <= 0.5:
            raise ConfigError(f"share={self.share!r} must be a share above 0 and up to 0.5.")

    def read(self, layer: int, facts: Facts) -> tuple[TowerNeed, ...]:
        return (Keys(layer),)

    def counts(self, signals: Signals, budget: Budget) -> list[int]:
        inside = signals.inside
        if inside is None:
            return super().counts(signals, budget)
        n, stages = signals.n, len(inside.layers) - inside.stage
        wanted = [budget.count(entered) for entered in inside.entered]
        return [
            min(n, max(k, math.ceil(n * min(1 - self.share, (k / n) ** (1 / stages)) - 1e-6)))
            for k in wanted
        ]

    def select(self, signals: Signals, k: int) -> Selection:
        return merged_by_keys(signals, k)
