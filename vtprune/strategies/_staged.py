"""Base of strategies by which shares of all visual tokens are left before layers of a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from vtprune.errors import ConfigError
from vtprune.scoring.schedule import check_mean, staged_counts
from vtprune.types import Budget, Facts, Quantity, Scope, Signals, Site, Stage, Strategy


@dataclass(frozen=True)
class Staged(Strategy):
    """``layers`` are those before which tokens leave, by default ``before``, of 32.

    ``ratios`` say what is left of all visual tokens before each, the last ones where there are
    fewer layers. ``keep`` is the mean number of visual tokens that enter a layer: the ratios get
    the power that leads there.
    """

    kind: ClassVar[Literal["adaptive"]] = "adaptive"
    acts_inside: ClassVar[bool] = True
    scope: ClassVar[Scope] = "sample"
    before: ClassVar[tuple[int, ...]]

    ratios: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "ratios", tuple(self.ratios))
        steps = zip((1.0, *self.ratios), self.ratios, strict=False)
        if not self.ratios or not all(1 >= a > b > 0 for a, b in steps):
            raise ConfigError(f"ratios={self.ratios} must fall, from below 1 to above 0.")

    def default_layers(self, facts: Facts) -> tuple[int, ...]:
        return tuple(sorted({facts.scale_decoder(layer, 32) for layer in self.before}))

    def plan(self, facts: Facts) -> tuple[Stage, ...]:
        layers = self.used_layers(facts)
        if len(layers) > len(self.ratios):
            raise ConfigError(f"layers={layers} need as many ratios; given are {self.ratios}.")
        return tuple(Stage(Site.DECODER, self.read(at, layers[0]), at) for at in layers)

    def read(self, at: int, first: int) -> tuple[Quantity, ...]:
        """Returns what is read for the stage before layer ``at``; the first is before ``first``."""
        raise NotImplementedError(f"{type(self).__name__} must define read().")

    def check_budget(self, budget: Budget, facts: Facts) -> None:
        check_mean(budget, self.used_layers(facts)[0], facts, self.name)

    def counts(self, signals: Signals, budget: Budget) -> list[int]:
        n_stages = len(signals.inside.layers) if signals.inside else 1
        return staged_counts(signals, budget, self.ratios[-n_stages:], self.name)
