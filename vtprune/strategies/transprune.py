"""TransPrune: drop in stages the tokens that layers of the language model change least.

A token's transition is how much attention and MLP stretch and turn it, summed over the layers since
the one before the first stage; the attention of the instruction is added to it. Later layers run
shorter; with ``instruction=False`` no attention is read at all. arXiv 2507.20630
(liaolea/TransPrune). As in the official code turning is 1 - cos (the paper: 1 - |cos|, which is
``abs_cos``), the attention is that of the layer that a stage acts before, and positions are
renumbered. The official code normalises over all samples of a batch, here each is taken alone.
Defaults: official scripts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from vtprune.errors import ConfigError
from vtprune.scoring.schedule import check_mean, staged_counts
from vtprune.types import (
    Budget,
    Facts,
    Quantity,
    Scope,
    Signals,
    Site,
    Stage,
    Strategy,
    TextRows,
    Transition,
)


@dataclass(frozen=True)
class TransPrune(Strategy):
    """``layers`` are those before which tokens leave, by default 7, 9 and 12 of 32.

    ``ratios`` say what is left of all visual tokens before each, the last ones where there are
    fewer layers. ``keep`` is the mean number of visual tokens that enter a layer: the ratios get
    the power that leads there, none at 0.41. For the authors' lower budget ``keep=0.314`` with
    ``ratios=(0.65, 0.25, 0.05)`` has their FLOPs; theirs are not public. ``alpha`` weighs
    transition against ``instruction``, which can be left out; ``abs_cos`` takes the cosine's
    absolute value.
    """

    kind: ClassVar[Literal["adaptive"]] = "adaptive"
    acts_inside: ClassVar[bool] = True
    scope: ClassVar[Scope] = "sample"

    ratios: tuple[float, ...] = (0.875, 0.625, 0.125)
    alpha: float = 0.5
    instruction: bool = True
    abs_cos: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "ratios", tuple(self.ratios))
        steps = zip((1.0, *self.ratios), self.ratios, strict=False)
        if not self.ratios or not all(1 >= a > b > 0 for a, b in steps):
            raise ConfigError(f"ratios={self.ratios} must fall, from below 1 to above 0.")
        if not 0 <= self.alpha <= 1:
            raise ConfigError(f"alpha={self.alpha} must be from 0 to 1.")

    def default_layers(self, facts: Facts) -> tuple[int, ...]:
        return tuple(sorted({facts.scale_decoder(layer, 32) for layer in (7, 9, 12)}))

    def plan(self, facts: Facts) -> tuple[Stage, ...]:
        layers = self.used_layers(facts)
        if len(layers) > len(self.ratios):
            raise ConfigError(f"layers={layers} need as many ratios; given are {self.ratios}.")
        return tuple(Stage(Site.DECODER, self._read(layers[0] - 1, at), at) for at in layers)

    def _read(self, first: int, at: int) -> tuple[Quantity, ...]:
        moved = tuple(Transition(layer, self.abs_cos) for layer in range(first, at))
        return (*moved, TextRows(at)) if self.instruction else moved

    def check_budget(self, budget: Budget, facts: Facts) -> None:
        check_mean(budget, self.used_layers(facts)[0], facts, self.name)

    def counts(self, signals: Signals, budget: Budget) -> list[int]:
        n_stages = len(signals.inside.layers) if signals.inside else 1
        return staged_counts(signals, budget, self.ratios[-n_stages:], self.name)

    def score(self, signals: Signals) -> Tensor:
        moved = _share(signals.stack(Transition).sum(0))  # [B, N]
        if not self.instruction:
            return moved
        return self.alpha * moved + (1 - self.alpha) * _share(signals.stack(TextRows)[-1])


def _share(x: Tensor) -> Tensor:
    x = x.float().nan_to_num(0.0, 0.0, 0.0)
    return x / (x.sum(1, keepdim=True) + 1e-8)
