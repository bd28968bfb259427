"""NAAViT: visual tokens do not attend; they are keys and values for the text, and pass the MLPs.

Attention among visual tokens is redundant: without it they are carried through the language model
by its MLPs alone, and text still sees them in every layer. arXiv 2502.02458 (icip-cas/SAISA). Saved
are queries, attention and output of visual rows, with ``mlp=False`` all but keys and values; text
before and after the image is as ever. The authors train their models so: on others fewer ``layers``
are meant. Not as in the official code, any number of images may stand anywhere in the prompt.
Defaults: the paper's pilot study.
"""

from __future__ import annotations

from dataclasses import dataclass

from vtprune.strategies._compute import Compute
from vtprune.types import Facts, RowRule


@dataclass(frozen=True)
class NAAViT(Compute):
    """``mlp`` says whether visual rows pass the MLP; without it they leave a layer as they came."""

    mlp: bool = True

    def rule(self, layer: int, facts: Facts) -> RowRule:
        return RowRule(attend="none", mlp=float(self.mlp))
