"""DyVTE: let all visual tokens leave before the first layer at which a gate says they may.

A small trained gate reads the words after the image as they enter a layer: the mean of all but the
last, and the last. Where it says exit, the text has seen enough: the prefill is shorter from there
on, and so are those layers' caches. arXiv 2411.19628 (DoubtedSteam/DyVTE). Each sample leaves on
its own; one word after the image is its own mean, of which that code makes no number. Gates come
with the shipped models; ``vtprune train dyvte`` makes those of others. ``keep`` is reached on
average over samples like those that the gates were calibrated on. Defaults: official code, but for
the threshold.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from vtprune.errors import ConfigError, InputError
from vtprune.gates import KIND, TRAIN, Gates, load
from vtprune.gates import threshold as calibrated
from vtprune.scoring.schedule import check_mean
from vtprune.types import (
    Budget,
    Facts,
    Positions,
    Scope,
    Signals,
    Site,
    Stage,
    Strategy,
    TextState,
)


@dataclass(frozen=True)
class DyVTE(Strategy):
    """``gates``: a file of them, a folder that holds it, or the name of a shipped model.

    By default the folder that the model was loaded from.

    ``layers`` are those before which tokens may leave, by default all but the first. ``keep`` is
    the mean number of visual tokens that enter a layer. With a ``threshold`` tokens leave where
    exit is ahead of stay by more than that (the authors': 0), and ``keep`` must be 1.0.
    """

    gates: str | None = None
    threshold: float | None = None

    kind: ClassVar[Literal["exit"]] = "exit"
    positions: ClassVar[Positions] = "keep"
    acts_inside: ClassVar[bool] = True
    scope: ClassVar[Scope] = "sample"
    trained: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.threshold is not None and math.isnan(self.threshold):
            raise ConfigError(f"threshold={self.threshold} must be a number.")

    def beside(self, folder: str) -> DyVTE:
        return self if self.gates is not None else replace(self, gates=KIND.beside(folder))

    def default_layers(self, facts: Facts) -> tuple[int, ...]:
        return tuple(range(facts.first_stage, facts.decoder_layers))

    def plan(self, facts: Facts) -> tuple[Stage, ...]:
        layers = self.used_layers(facts)
        return tuple(Stage(Site.DECODER, (TextState(layer),), layer) for layer in layers)

    def check_budget(self, budget: Budget, facts: Facts) -> None:
        gates = self.found()
        if gates.depth != facts.decoder_layers:
            raise ConfigError(
                f"gates={self.gates!r} are for {gates.depth} layers; {facts.family} has "
                f"{facts.decoder_layers}. {TRAIN}"
            )
        if self.threshold is not None and budget != Budget(fraction=1.0):
            raise ConfigError(
                f"keep={budget.tokens or budget.fraction} and threshold={self.threshold} both say "
                "when tokens leave. Give keep=1.0 with a threshold, or leave the threshold out."
            )
        if self.threshold is None and budget.fraction != 1.0:
            check_mean(budget, self.used_layers(facts)[0], facts, self.name)
            if not len(gates.margins):
                raise ConfigError(
                    f"gates={self.gates!r} were not calibrated, so no threshold is known for keep="
                    f"{budget.tokens or budget.fraction}. Give threshold= and keep=1.0."
                )

    def found(self, device: str = "cpu") -> Gates:
        """Returns the gates; raises ConfigError where there are none."""
        if self.gates is None:
            raise ConfigError(f"{self.name} has no gates for this model. {TRAIN}")
        return load(self.gates, device)

    def counts(self, signals: Signals, budget: Budget) -> list[int]:
        inside = signals.inside
        if inside is None:
            raise InputError(f"{self.name} decides by layers; signals.inside says where it acts.")
        gates = self.found(str(signals.tokens.device))
        margins = gates.margin(signals.stack(TextState)[-1], inside.layers[inside.stage]).tolist()
        limits = [self._limit(gates, budget, n, inside.layers) for n in inside.entered]
        return [
            0 if margin > limit else signals.n
            for margin, limit in zip(margins, limits, strict=True)
        ]

    def _limit(self, gates: Gates, budget: Budget, n: int, layers: tuple[int, ...]) -> float:
        """Returns the threshold for a sample of which ``n`` tokens entered."""
        if self.threshold is not None:
            return self.threshold
        share = budget.fraction or min(1.0, (budget.tokens or 0) / n)
        return math.inf if share >= 1 else calibrated(gates, layers, share)
