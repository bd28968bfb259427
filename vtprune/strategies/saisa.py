"""SAISA: in each layer visual tokens are the tower's features through that layer's own projector.

They are keys and values for the text there, and nothing else: no queries, no attention, no MLP.
arXiv 2502.02458 (icip-cas/SAISA). Saved is all that layers compute for visual tokens but keys and
values; the projectors are added. It needs training: mini-llava comes with projectors, and
``vtprune train saisa`` makes those of other models, whose own weights stay, where the authors train
a language model along with them. Features are the output of the block that yields them, without a
norm that some towers have behind it; where a token is made of several patches, their mean; tokens
made of none stay as they came. Defaults: official code.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from vtprune.errors import ConfigError
from vtprune.projectors import KIND, TRAIN, Projected, Projectors, load
from vtprune.strategies._compute import Compute
from vtprune.types import Budget, Facts, Patches, RowRule


@dataclass(frozen=True)
class SAISA(Compute):
    """``projectors``: a file, a folder that holds it, the name of a shipped model, or themselves.

    By default the folder that the model was loaded from.
    """

    trained: ClassVar[bool] = True

    projectors: str | Projectors | None = None

    def beside(self, folder: str) -> SAISA:
        if self.projectors is not None:
            return self
        return replace(self, projectors=KIND.beside(folder))

    def check_budget(self, budget: Budget, facts: Facts) -> None:
        depth = load(self.projectors).depth
        if depth != facts.decoder_layers:
            raise ConfigError(
                f"projectors={self.projectors!r} are for {depth} layers; {facts.family} has "
                f"{facts.decoder_layers}. {TRAIN}"
            )

    def rule(self, layer: int, facts: Facts) -> RowRule:
        made = Projected(layer, Patches(facts.feature_block), self.projectors)
        return RowRule(attend="none", mlp=0.0, maker=made)
