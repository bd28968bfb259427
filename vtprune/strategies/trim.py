"""TRIM: keep the tokens that are most relevant to the instruction.

Nothing but the similarity of text and visual tokens counts, so no attention map is read; tokens may
repeat each other. arXiv 2409.10994. The prefill gets shorter; the tower runs in full. The relevance
is that of the language model's embeddings of the words, or with ``tower`` the authors' own, by
CLIP's text tower. Only the score is theirs: the count is the budget instead of the outliers among
the scores, and nothing is made of the tokens that leave.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vtprune.scoring.guidance import guidance, guidance_needs
from vtprune.types import Facts, Need, Signals, Strategy


@dataclass(frozen=True)
class TRIM(Strategy):
    """``tower``: whether CLIP's text tower, given by the user, tells what is relevant."""

    tower: bool = False

    def needs(self, facts: Facts) -> tuple[Need, ...]:
        return guidance_needs(facts, tower=self.tower)

    def score(self, signals: Signals) -> Tensor:
        return guidance(signals)  # [B, N]
