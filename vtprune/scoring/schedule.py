"""Budgets of strategies that act before several layers of the language model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from vtprune.errors import ConfigError, InputError
from vtprune.types import Budget, Facts, Signals


def scaled(
    ratios: Sequence[float], layers: Sequence[int], depth: int, keep: float
) -> tuple[float, ...]:
    """Returns the powers ``r ** t`` of ``ratios`` by which ``keep`` is the mean over all layers.

    Args:
        ratios: what is left of all tokens before each of ``layers``, below 1 and falling.
        layers: 0-based, ascending; everything enters those before the first.
        depth: number of layers.
        keep: from 0 to 1. Below ``layers[0] / depth`` no power is small enough, and they end at 0.
    """
    lengths = [b - a for a, b in pairwise((0, *layers, depth))]
    powers = [math.log(ratio) / math.log(ratios[0]) for ratio in ratios]
    low, high = 0.0, 1.0
    for _ in range(50):
        first = (low + high) / 2
        left = [1.0, *(first**power for power in powers)]
        mean = sum(n * share for n, share in zip(lengths, left, strict=True)) / depth
        low, high = (first, high) if mean < keep else (low, first)
    return tuple(high**power for power in powers)


def staged_counts(
    signals: Signals, budget: Budget, ratios: Sequence[float], name: str
) -> list[int]:
    """Returns how many tokens of each row a stage leaves, if the mean over layers is the budget.

    Args:
        ratios: as of ``scaled``, one per stage of the strategy.
        name: of the strategy, for messages.

    Raises:
        InputError: the signals do not say where the stage acts.
    """
    inside = signals.inside
    if inside is None:
        raise InputError(f"{name} counts by layers; signals.inside says where it acts.")
    counts = []
    for n in inside.entered:
        mean = budget.fraction or min(1.0, (budget.tokens or 0) / n)
        left = n * scaled(ratios, inside.layers, inside.depth, mean)[inside.stage]
        counts.append(max(1, min(signals.n, int(left + 1e-6))))
    return counts


def check_mean(budget: Budget, first: int, facts: Facts, name: str) -> None:
    """Raises ConfigError for a mean over layers below what enters those before ``first``."""
    n, depth = facts.n_tokens, facts.decoder_layers
    share = budget.tokens / n if budget.tokens is not None and n else budget.fraction
    if share is not None and share <= first / depth:
        raise ConfigError(
            f"keep={budget.tokens or budget.fraction} is out of reach of {name}: all "
            f"tokens enter the first {first} of {depth} layers. Give more than "
            f"{first / depth:.3g}, or layers= that begin earlier."
        )


@dataclass(frozen=True)
class Part:
    """What share of the tokens one of several stages leaves, if the mean over layers is as asked.

    Give it to a ``Stage`` as its ``times``. Stages leave shares in proportion to ``ratios``, but
    none more than all.

    Attributes:
        ratios: of each stage, above 0; the first acts before the language model.
        layers: 0-based, ascending, before which the others act; ``depth``: number of layers.
        stage: 0-based number of the stage that this is the part of.
    """

    ratios: tuple[float, ...]
    layers: tuple[int, ...]
    depth: int
    stage: int

    def __call__(self, keep: float) -> float:
        """Returns the share for a mean of ``keep``, from 0 to 1."""
        lengths = [b - a for a, b in pairwise((0, *self.layers, self.depth))]
        low, high = 0.0, 1 / min(self.ratios)
        for _ in range(50):
            scale = (low + high) / 2
            left = [min(1.0, scale * ratio) for ratio in self.ratios]
            mean = sum(n * share for n, share in zip(lengths, left, strict=True)) / self.depth
            low, high = (scale, high) if mean < keep else (low, scale)
        return min(1.0, high * self.ratios[self.stage])


@dataclass(frozen=True)
class Before:
    """What share a stage leaves, if a later one leaves the share ``left`` of that, in the end.

    Give it to a ``Stage`` as its ``times``. It leaves no more than all.
    """

    left: float

    def __call__(self, keep: float) -> float:
        """Returns the share where ``keep`` is left in the end."""
        return min(1.0, keep / self.left)


@dataclass(frozen=True)
class Falling:
    """What share is left after ``done`` of ``steps`` equal steps down to the share asked for.

    Give it to a ``Stage`` as its ``times``.
    """

    done: int
    steps: int

    def __call__(self, keep: float) -> float:
        """Returns the share where ``keep`` is left in the end."""
        return 1 - (1 - keep) * self.done / self.steps
