"""VTC-CLS: [CLS] attention summed over an ensemble of late blocks.

Several layers vote, which is steadier than the last one alone; the prefill gets shorter as with
FasterVLM. arXiv 2412.05819 (THU-MIG/VTC-CLS). The sum has no weights, as in the official code, and
ends at the block that yields the features. A tower without [CLS] uses attention received instead.
Defaults: official code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vtprune.errors import ConfigError
from vtprune.scoring.attention import salience, salience_needs
from vtprune.types import Facts, Need, Scope, Signals, Strategy

DEPTH = 24  # blocks of the authors' tower, in which ``start`` is stated


@dataclass(frozen=True)
class VTCCls(Strategy):
    """``start``: first block of the ensemble in a tower of 24 (the authors' default is 16)."""

    scope: ClassVar[Scope] = "tile"

    start: int = 16

    def __post_init__(self) -> None:
        if isinstance(self.start, bool) or not 0 <= self.start < DEPTH:
            raise ConfigError(f"start={self.start!r} must be a block of {DEPTH}, 0 to {DEPTH - 1}.")

    def default_layers(self, facts: Facts) -> tuple[int, ...]:
        first = min(facts.scale(self.start, DEPTH), facts.feature_block)
        return tuple(range(first, facts.feature_block + 1))

    def needs(self, facts: Facts) -> tuple[Need, ...]:
        return salience_needs(self.used_layers(facts), facts)

    def score(self, signals: Signals) -> Tensor:
        return salience(signals)
