"""Base of strategies that let every token stay and compute less for the visual ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from vtprune.errors import UnsupportedError
from vtprune.types import Facts, Positions, RowRule, Scope, Site, Stage, Strategy


@dataclass(frozen=True)
class Compute(Strategy):
    """``layers`` are those that the rule is for, by default all of the language model."""

    kind: ClassVar[Literal["compute"]] = "compute"
    positions: ClassVar[Positions] = "keep"
    acts_inside: ClassVar[bool] = True
    scope: ClassVar[Scope] = "sample"

    def default_layers(self, facts: Facts) -> tuple[int, ...]:
        return tuple(range(facts.decoder_layers))

    def plan(self, facts: Facts) -> tuple[Stage, ...]:
        if not facts.decoder_layers:
            raise UnsupportedError(
                f"{self.name} acts inside the language model, whose layers {facts.family} does not "
                "show. Use a strategy that acts before it, such as 'divprune'."
            )
        layers = self.used_layers(facts)
        rules = [self.rule(layer, facts) for layer in layers]
        return tuple(
            Stage(Site.DECODER, rule.needs, layer, rule=rule)
            for layer, rule in zip(layers, rules, strict=True)
        )

    def rule(self, layer: int, facts: Facts) -> RowRule:
        """Returns what visual rows compute in a layer (0-based)."""
        raise NotImplementedError(f"{type(self).__name__} must define rule().")
