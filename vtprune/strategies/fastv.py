"""FastV: after a few layers of the language model keep the tokens that the last token attends to.

The first layers mix the image into the text; after them most visual tokens get hardly any
attention, so the rest of the layers run without them. arXiv 2403.06764 (pkunlp-icler/FastV). As in
the official code the ranking is by the layer before (mean over heads, row of the last prompt token)
and survivors keep their position ids. Defaults: the paper.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vtprune.types import Facts, LastRow, Positions, Scope, Signals, Site, Stage, Strategy


@dataclass(frozen=True)
class FastV(Strategy):
    """``layers`` holds the one layer before which tokens leave, by default 2 of 32 (K = 2).

    ``keep`` counts the tokens of a sample that enter that layer and all later ones.
    """

    positions: ClassVar[Positions] = "keep"
    acts_inside: ClassVar[bool] = True
    scope: ClassVar[Scope] = "sample"

    def default_layers(self, facts: Facts) -> tuple[int, ...]:
        return (facts.scale_decoder(2, 32),)

    def plan(self, facts: Facts) -> tuple[Stage, ...]:
        (layer,) = self.used_layers(facts)
        return (Stage(Site.DECODER, (LastRow(layer - 1),), layer),)

    def score(self, signals: Signals) -> Tensor:
        return signals.stack(LastRow)[-1]
