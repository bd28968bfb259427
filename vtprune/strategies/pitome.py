"""PiToMe: in every block merge patches of large groups that are alike, and spare the others.

A patch has energy by the tokens whose keys (mean over heads) are more like its own than a margin,
which falls with the blocks to 0. In later blocks the patches of highest energy are paired by its
order and merged, all others stay as they are; in the first half of the blocks all take part, and
the best pairs merge. The mean is weighted by the patches that each token stands for.
arXiv 2405.16148 (hchautran/PiToMe). The rest of the tower, the projector and the prefill run on
fewer tokens. As in the official code, unlike the paper, a merged token gets attention as one. The
code keeps a share of the tokens of each block; here every block merges equally many, so that
``keep`` is met exactly, repeatedly where halving is not enough for that. Tokens are back in the
order of the image, each at the place that was merged into, and no prefix token takes part. Where a
visual token is made of several patches, projected tokens are merged in one go, by the keys of the
block that yields the features and the margin of the first. Defaults: official code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from vtprune.errors import ConfigError
from vtprune.scoring.energy import match_by_energy
from vtprune.scoring.matching import ascending, averaged, merge_down
from vtprune.strategies._blocks import InBlocks
from vtprune.types import Facts, Keys, Selection, Signals, TowerNeed

MARGINS = {"keys": 0.75, "states": 0.95}


@dataclass(frozen=True)
class PiToMe(InBlocks):
    """``layers`` are the blocks that merge, by default all up to the one that yields the features.

    ``metric``: what is compared, ``keys`` (mean over heads; officially of timm's models) or the
    hidden ``states`` (officially of CLIP). ``margin``: that of block 0, by default 0.75 for keys
    and 0.95 for states. ``alpha``: what a token that is like nothing loses at most. ``bsm``: in
    which share of the blocks, from the first on, all tokens take part; without blocks, in the one
    merge if it is 1. ``prop_attn``: whether a merged token gets attention for all patches it stands
    for, as in the paper.
    """

    metric: Literal["keys", "states"] = "keys"
    margin: float | None = None
    alpha: float = 1.0
    bsm: float = 0.5
    prop_attn: bool = False

    def __post_init__(self) -> None:
        if self.metric not in MARGINS:
            raise ConfigError(f"metric={self.metric!r} is unknown; choose {', '.join(MARGINS)}.")
        if self.margin is not None and not -1 <= self.margin <= 1:
            raise ConfigError(f"margin={self.margin!r} must be a cosine, from -1 to 1.")
        if not 0 <= self.alpha < math.inf:
            raise ConfigError(f"alpha={self.alpha!r} must be a number of at least 0.")
        if not 0 <= self.bsm <= 1:
            raise ConfigError(f"bsm={self.bsm!r} must be a share from 0 to 1.")

    @property
    def weighs(self) -> bool:
        return self.prop_attn

    def read(self, layer: int, facts: Facts) -> tuple[TowerNeed, ...]:
        return (Keys(layer),) if self.metric == "keys" else ()

    def select(self, signals: Signals, k: int) -> Selection:
        metric = signals.stack(Keys)[-1] if self.metric == "keys" else signals.tokens
        size = metric.new_ones(metric.shape[:2]).float() if signals.size is None else signals.size
        margin, protect = self.at(signals)

        def pair(metric: Tensor, r: int, n_prefix: int) -> tuple[Tensor, Tensor]:
            return match_by_energy(metric, r, margin, self.alpha, protect)

        rows, into = merge_down(metric, size, k, pair=pair)
        return averaged(*ascending(rows, into), size)

    def at(self, signals: Signals) -> tuple[float, bool]:
        """Returns the margin where a stage acts, and whether it spares those of low energy."""
        margin = MARGINS[self.metric] if self.margin is None else self.margin
        if signals.inside is None:
            return margin, self.bsm < 1
        inside = signals.inside
        passed = inside.layers[inside.stage] / inside.depth
        return margin * (1 - passed), passed >= self.bsm
