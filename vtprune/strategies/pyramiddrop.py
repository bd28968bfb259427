"""PyramidDrop: drop visual tokens in equal steps on the way through the language model.

Redundancy grows with depth, so each stage keeps the same share of the one before. arXiv 2410.17247
(Cooperx521/PyramidDrop). As in the official code a stage ranks by the attention of the last prompt
token in the layer it acts before (mean over heads), and positions are renumbered from there on.
Defaults: official scripts.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

from torch import Tensor

from vtprune.errors import ConfigError, InputError
from vtprune.types import Budget, Facts, Inside, LastRow, Scope, Signals, Site, Stage, Strategy


@dataclass(frozen=True)
class PyramidDrop(Strategy):
    """``layers`` are those before which tokens leave, by default 8, 16 and 24 of 32.

    ``keep`` is the mean number of visual tokens that enter a layer; the share that each stage
    keeps follows from it. The authors' share is 0.5, at equal stages keep = 0.469.
    """

    kind: ClassVar[Literal["adaptive"]] = "adaptive"
    acts_inside: ClassVar[bool] = True
    scope: ClassVar[Scope] = "sample"

    def default_layers(self, facts: Facts) -> tuple[int, ...]:
        return tuple(sorted({facts.scale_decoder(layer, 32) for layer in (8, 16, 24)}))

    def plan(self, facts: Facts) -> tuple[Stage, ...]:
        layers = self.used_layers(facts)
        return tuple(Stage(Site.DECODER, (LastRow(layer),), layer) for layer in layers)

    def check_budget(self, budget: Budget, facts: Facts) -> None:
        first, depth = self.used_layers(facts)[0], facts.decoder_layers
        n = facts.n_tokens
        share = budget.tokens / n if budget.tokens is not None and n else budget.fraction
        if share is not None and share <= first / depth:
            raise ConfigError(
                f"keep={budget.tokens or budget.fraction} is out of reach of {self.name}: all "
                f"tokens enter the first {first} of {depth} layers. Give more than "
                f"{first / depth:.3g}, or layers= that begin earlier."
            )

    def counts(self, signals: Signals, budget: Budget) -> list[int]:
        inside = signals.inside
        if inside is None:
            raise InputError(f"{self.name} counts by layers; signals.inside says where it acts.")
        counts = []
        for n in inside.entered:
            mean = budget.fraction or min(1.0, (budget.tokens or 0) / n)
            left = n * share(inside, mean) ** (inside.stage + 1)
            counts.append(max(1, min(signals.n, int(left + 1e-6))))
        return counts

    def score(self, signals: Signals) -> Tensor:
        return signals.stack(LastRow)[-1]


def share(inside: Inside, keep: float) -> float:
    """Returns what each stage keeps of the one before, so that the mean over layers is ``keep``."""
    ends = (*inside.layers, inside.depth)
    lengths = [b - a for a, b in pairwise((0, *ends))]
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        mean = sum(n * middle**i for i, n in enumerate(lengths)) / inside.depth
        low, high = (middle, high) if mean < keep else (low, middle)
    return high
