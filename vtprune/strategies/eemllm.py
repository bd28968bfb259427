"""EE-MLLM: visual tokens see nothing but themselves; each layer's own weights align them.

Composite attention: queries of text see everything before them, visual tokens do not see each
other, and the weights of the layer take the place of a connector. arXiv 2408.11795. Saved are the
queries and the attention of visual rows. There is no official code, and the paper leaves open which
weights align: ``self+ffn`` takes values, output and MLP of the layer, ``ffn`` the MLP alone, as
NAAViT does. The authors train their model so. Defaults: ours, by the paper's idea.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from vtprune.errors import ConfigError
from vtprune.strategies._compute import Compute
from vtprune.types import Facts, RowRule

VisualRows = Literal["self+ffn", "ffn"]


@dataclass(frozen=True)
class EEMLLM(Compute):
    """``visual_rows`` is ``self+ffn`` or ``ffn``: what they take of a layer."""

    visual_rows: VisualRows = "self+ffn"

    def __post_init__(self) -> None:
        if self.visual_rows not in get_args(VisualRows):
            known = " or ".join(map(repr, get_args(VisualRows)))
            raise ConfigError(f"visual_rows={self.visual_rows!r} is unknown; choose {known}.")

    def rule(self, layer: int, facts: Facts) -> RowRule:
        return RowRule(attend="self" if self.visual_rows == "self+ffn" else "none")
