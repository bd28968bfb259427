"""CDPruner: keep tokens that are relevant to the instruction and unlike each other.

A determinantal point process on the cosines of the projected tokens, each weighted by its relevance
to the instruction, is maximised greedily. arXiv 2506.10967 (Theia-4869/CDPruner). The prefill gets
shorter; the tower runs in full. The relevance is that of the language model's embeddings of the
words, or with ``tower`` the authors' own, by CLIP's text tower. Normalised in float32 per image.
Tiles that one prompt stitches together share one budget, as one image; the authors give each its
own. Where nothing adds to the determinant any more the most relevant tokens follow.
"""

from __future__ import annotations

from dataclasses import dataclass

from vtprune.kernels.greedy_select import greedy_select
from vtprune.scoring.guidance import guidance, guidance_needs, unit_range
from vtprune.types import Facts, Need, Selection, Signals, Strategy


@dataclass(frozen=True)
class CDPruner(Strategy):
    """``tower``: whether CLIP's text tower, given by the user, tells what is relevant."""

    tower: bool = False

    def needs(self, facts: Facts) -> tuple[Need, ...]:
        return guidance_needs(facts, tower=self.tower)

    def select(self, signals: Signals, k: int) -> Selection:
        weights = unit_range(guidance(signals), signals.item)  # [B, N]
        picked = greedy_select(signals.tokens, k, mode="dpp", relevance=weights)
        return Selection(picked.sort(dim=1).values, signals.n)
