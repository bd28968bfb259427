"""CDPruner: keep tokens that are relevant to the instruction and unlike each other.

A determinantal point process on the cosines of the projected tokens, each weighted by its relevance
to the instruction, is maximised greedily. arXiv 2506.10967 (Theia-4869/CDPruner). The prefill gets
shorter; the tower runs in full. The relevance is that of the language model's embeddings of the
words, or where ``wrap`` is given CLIP's text tower the authors' own; it is normalised in float32
over all tiles of an image. Where nothing adds to the determinant any more the most relevant tokens
follow. Defaults: none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vtprune.kernels.greedy_select import greedy_select
from vtprune.scoring.guidance import guidance_needs, unit_guidance
from vtprune.types import Facts, Need, Scope, Selection, Signals, Strategy


@dataclass(frozen=True)
class CDPruner(Strategy):
    """Reads the instruction, by CLIP's text tower where ``wrap`` is given one."""

    scope: ClassVar[Scope] = "tile"

    def needs(self, facts: Facts) -> tuple[Need, ...]:
        return guidance_needs(facts)

    def select(self, signals: Signals, k: int) -> Selection:
        weights = unit_guidance(signals)  # [B, N]
        picked = greedy_select(signals.tokens, k, mode="dpp", relevance=weights)
        return Selection(picked.sort(dim=1).values, signals.n)
