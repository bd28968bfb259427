"""FasterVLM: keep the patches that [CLS] attends to most in the block that yields the features.

[CLS] attention ranks what the image is about before the language model sees it, so the whole
prefill runs on the short prompt. arXiv 2412.01818 (Theia-4869/FasterVLM). Kept tokens stay in
raster order and positions are renumbered, as in the official code. A tower without [CLS] has no
official rule; attention received (mean over all queries) stands in. Defaults: official code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vtprune.scoring.attention import salience, salience_needs
from vtprune.types import Facts, Need, Scope, Signals, Strategy


@dataclass(frozen=True)
class FasterVLM(Strategy):
    """Reads one block, by default the one whose output is projected."""

    scope: ClassVar[Scope] = "tile"

    def default_layers(self, facts: Facts) -> tuple[int, ...]:
        return (facts.feature_block,)

    def needs(self, facts: Facts) -> tuple[Need, ...]:
        return salience_needs(self.used_layers(facts), facts)

    def score(self, signals: Signals) -> Tensor:
        return salience(signals)
