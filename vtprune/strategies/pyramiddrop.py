"""PyramidDrop: drop visual tokens in equal steps on the way through the language model.

Redundancy grows with depth, so each stage keeps the same share of the one before. arXiv 2410.17247
(Cooperx521/PyramidDrop). As in the official code a stage ranks by the attention of the last prompt
token in the layer it acts before (mean over heads), and positions are renumbered from there on.
Defaults: official scripts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from vtprune.scoring.schedule import check_mean, staged_counts
from vtprune.types import Budget, Facts, LastRow, Scope, Signals, Site, Stage, Strategy


@dataclass(frozen=True)
class PyramidDrop(Strategy):
    """``layers`` are those before which tokens leave, by default 8, 16 and 24 of 32.

    ``keep`` is the mean number of visual tokens that enter a layer; the share that each stage
    keeps follows from it. The authors' share is 0.5, at equal stages keep = 0.469.
    """

    kind: ClassVar[Literal["adaptive"]] = "adaptive"
    acts_inside: ClassVar[bool] = True
    scope: ClassVar[Scope] = "sample"

    def default_layers(self, facts: Facts) -> tuple[int, ...]:
        return tuple(sorted({facts.scale_decoder(layer, 32) for layer in (8, 16, 24)}))

    def plan(self, facts: Facts) -> tuple[Stage, ...]:
        layers = self.used_layers(facts)
        return tuple(Stage(Site.DECODER, (LastRow(layer),), layer) for layer in layers)

    def check_budget(self, budget: Budget, facts: Facts) -> None:
        check_mean(budget, self.used_layers(facts)[0], facts, self.name)

    def counts(self, signals: Signals, budget: Budget) -> list[int]:
        n_stages = len(signals.inside.layers) if signals.inside else 1
        ratios = [0.5 ** (stage + 1) for stage in range(n_stages)]
        return staged_counts(signals, budget, ratios, self.name)

    def score(self, signals: Signals) -> Tensor:
        return signals.stack(LastRow)[-1]
