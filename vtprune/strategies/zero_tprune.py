"""Zero-TPrune: a page rank over the attention graph, and no two patches of the same kind.

After a few blocks patches leave in two steps. First those of the less important half whose keys, of
all heads side by side, are most like one of the other half; they are dropped, not merged. Then
those of least importance: every token hands its own on to the tokens that it attends to, many times
in early blocks and once in late ones, where [CLS] begins with the square root of the number of
tokens times as much as another, if there is one. Heads whose scores hardly vary, or too much, do
not count; of the others it is the root mean square. For the halves of the first step one round is
enough. CVPR 2024, arXiv 2305.17328 (there is no official code; the variance is here that of scores
of mean 1, for which the paper's range makes sense). ``keep`` is met exactly: what the published
shares leave after each stage gets the power that leads there. All tokens of the prefix stay and
take part. It needs whole attention maps, which a ViT by itself gives. Defaults: the paper's
ablation, of a depth of 12 and 196 patches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from vtprune.errors import ConfigError
from vtprune.kernels.topk_sorted import topk_sorted
from vtprune.scoring.page_rank import VARIANCE, among, over_heads, page_rank, unlike
from vtprune.strategies._blocks import InBlocks
from vtprune.types import (
    Budget,
    ClsRow,
    Facts,
    Maps,
    Selection,
    Signals,
    Site,
    Stage,
    TowerNeed,
    WideKeys,
)

AFTER, DEPTH, PATCHES = (0, 2, 5, 8, 10), 12, 196  # 0-based blocks


@dataclass(frozen=True)
class ZeroTPrune(InBlocks):
    """``layers`` are the blocks after which patches leave, by default 0, 2, 5, 8 and 10 of 12.

    ``retention``: which share of the patches the second step of each leaves, and ``similar`` how
    many of 196 the first drops; both only say how what ``keep`` takes away is shared out.
    ``rounds``: of the page rank, of each. Other numbers of blocks take evenly chosen ones of these.
    ``variance``: the range of a head that counts. ``uniform``: let [CLS] begin as any other token.
    """

    retention: tuple[float, ...] = (1.0, 0.9, 0.8, 0.7, 1.0)
    similar: int = 10
    rounds: tuple[int, ...] = (30, 5, 5, 1, 1)
    variance: tuple[float, float] = VARIANCE
    uniform: bool = False

    def __post_init__(self) -> None:
        for name in ("retention", "rounds", "variance"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not self.retention or not all(0 < share <= 1 for share in self.retention):
            raise ConfigError(f"retention={self.retention} must be shares above 0 and up to 1.")
        if isinstance(self.similar, bool) or not 0 <= self.similar < PATCHES / len(self.retention):
            raise ConfigError(
                f"similar={self.similar!r} must be a number of patches, of {PATCHES}, from 0 on, "
                f"and so few that {len(self.retention)} stages can drop them."
            )
        if not self.similar and set(self.retention) == {1}:
            raise ConfigError("similar=0 and retention of 1 drop nothing; lower a share.")
        if len(self.rounds) != len(self.retention) or min(self.rounds) < 1:
            raise ConfigError(
                f"rounds={self.rounds} must be whole numbers above 0, one for each of retention="
                f"{self.retention}."
            )
        if len(self.variance) != 2 or not 0 <= self.variance[0] <= self.variance[1]:
            raise ConfigError(f"variance={self.variance} must be a range from 0 on: (low, high).")

    def default_layers(self, facts: Facts) -> tuple[int, ...]:
        return tuple(sorted({facts.scale(block, DEPTH) for block in AFTER}))

    def read(self, layer: int, facts: Facts) -> tuple[TowerNeed, ...]:
        both = Maps(layer), WideKeys(layer)
        if facts.has_cls and not self.uniform:
            return (*both, ClsRow(layer))  # not for its values: it says that there is a [CLS]
        return both

    def stage(self, layer: int, facts: Facts) -> Stage:
        return Stage(Site.ENCODER, self.read(layer, facts), layer)

    def left(self) -> list[tuple[int, int]]:
        """Returns how many of 196 patches the two steps of each stage leave by default."""
        n, found = PATCHES, []
        for share in self.retention:
            unalike = max(1, n - self.similar)
            n = max(1, int(share * unalike))
            found.append((unalike, n))
        return found

    def entry(self, stage: int, n_stages: int) -> int:
        """Returns which of the shares is the last for a stage, -1 = none yet."""
        return round((stage + 1) * len(self.retention) / n_stages) - 1

    def counts(self, signals: Signals, budget: Budget) -> list[int]:
        inside = signals.inside
        if inside is None:
            return super().counts(signals, budget)
        left, last = self.left(), len(inside.layers) - 1
        entry = self.entry(inside.stage, len(inside.layers))
        passed = 1.0 if entry < 0 else left[entry][1] / PATCHES
        counts = []
        for n in inside.entered:
            k = budget.count(n)
            power = math.log(k / n) / math.log(left[-1][1] / PATCHES)
            wanted = k if inside.stage == last else round(n * passed**power)
            counts.append(max(k, min(signals.n, wanted)))
        return counts

    def alike(self, signals: Signals, k: int) -> int:
        """Returns how many tokens leave because they resemble others, of those that leave."""
        left, first, last = self.left(), 0, len(self.retention) - 1
        if signals.inside is not None:
            stage, stages = signals.inside.stage, len(signals.inside.layers)
            first, last = self.entry(stage - 1, stages) + 1, self.entry(stage, stages)
        if first > last:  # nothing leaves by default
            first, last = 0, len(left) - 1
        before = (PATCHES, *(n for _, n in left))
        dropped = sum(before[i] - left[i][0] for i in range(first, last + 1))
        gone = max(1, before[first] - left[last][1])
        return min(signals.n // 2, round((signals.n - k) * dropped / gone))

    def select(self, signals: Signals, k: int) -> Selection:
        maps, p = signals.stack(Maps)[-1], signals.n_prefix  # [B, H, S, S]
        boosted = any(isinstance(need, ClsRow) for need in signals.values)
        keys = signals.stack(WideKeys)[-1]
        left = unlike(keys, self.rank(maps, 1, boosted, p), self.alike(signals, k))
        if left.shape[1] == k:
            return Selection(left, signals.n)
        stages = (signals.inside.stage, len(signals.inside.layers)) if signals.inside else (0, 1)
        rounds = self.rounds[max(0, self.entry(*stages))]
        ranks = self.rank(among(maps, left, p), rounds, boosted, p)
        return Selection(left.gather(1, topk_sorted(ranks, k)), signals.n)

    def rank(self, maps: Tensor, rounds: int, boosted: bool, n_prefix: int) -> Tensor:
        """Returns the importance of each patch, ``[B, N]`` float32."""
        votes = page_rank(maps, rounds, boosted)
        return over_heads(votes, self.variance)[:, n_prefix:]
