"""TRIM: keep the tokens that are most relevant to the instruction.

Nothing but the similarity of text and visual tokens counts, so no attention map is read; tokens may
repeat each other. arXiv 2409.10994. The prefill gets shorter; the tower runs in full. The relevance
is that of the language model's embeddings of the words, or where ``wrap`` is given CLIP's text
tower the authors' own. Only the score is theirs: the count is the budget instead of the outliers
among the scores, and nothing is made of the tokens that leave. Defaults: none.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vtprune.scoring.guidance import guidance, guidance_needs
from vtprune.types import Facts, Need, Signals, Strategy


@dataclass(frozen=True)
class TRIM(Strategy):
    """Reads the instruction, by CLIP's text tower where ``wrap`` is given one."""

    def needs(self, facts: Facts) -> tuple[Need, ...]:
        return guidance_needs(facts)

    def score(self, signals: Signals) -> Tensor:
        return guidance(signals)  # [B, N]
