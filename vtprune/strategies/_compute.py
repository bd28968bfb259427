"""Bases of strategies that act in each layer of the language model and let every token stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from vtprune.errors import UnsupportedError
from vtprune.types import Facts, Positions, Rule, Scope, Site, Stage, Strategy


@dataclass(frozen=True)
class InEachLayer(Strategy):
    """``layers`` are those in which it acts, by default all of the language model."""

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
        return tuple(self.stage(layer, facts) for layer in self.used_layers(facts))

    def stage(self, layer: int, facts: Facts) -> Stage:
        """Returns the stage in a layer (0-based)."""
        raise NotImplementedError(f"{type(self).__name__} must define stage().")


@dataclass(frozen=True)
class Compute(InEachLayer):
    """Computes less for visual tokens, or edits attention, as ``rule`` says."""

    kind: ClassVar[Literal["compute"]] = "compute"

    def stage(self, layer: int, facts: Facts) -> Stage:
        rule = self.rule(layer, facts)
        return Stage(Site.DECODER, rule.needs, layer, rule=rule)

    def rule(self, layer: int, facts: Facts) -> Rule:
        """Returns what visual rows compute in a layer (0-based), or what becomes of attention."""
        raise NotImplementedError(f"{type(self).__name__} must define rule().")
