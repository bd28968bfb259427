"""VisionZip: keep the dominant tokens by [CLS] attention and merge the rest into a few.

The rest is merged by key similarity around evenly spaced targets, so that what is dropped still
leaves a trace. arXiv 2412.04467 (dvlab-research/VisionZip). As in the official code the [CLS] state
itself is one of the dominant tokens and comes first, merged tokens (target plus the mean of those
assigned to it) come last, and all of it happens before the projector. A tower without [CLS] ranks
by attention received and keeps no [CLS]. Where a visual token is made of several patches, both
happen to the projected tokens, with the mean of their patches' attention and keys, and no [CLS].
Defaults: official code; contextual from its README.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vtprune.errors import ConfigError
from vtprune.scoring.attention import salience, salience_needs
from vtprune.scoring.contextual import merge_rest
from vtprune.types import (
    ClsRow,
    Facts,
    Keys,
    Need,
    Scope,
    Selection,
    Signals,
    Site,
    Stage,
    Strategy,
)


@dataclass(frozen=True)
class VisionZip(Strategy):
    """``contextual``: merged tokens among those kept; by default 5 of 32, the authors' ratio."""

    scope: ClassVar[Scope] = "tile"

    contextual: int | None = None

    def __post_init__(self) -> None:
        if self.contextual is not None and (
            isinstance(self.contextual, bool) or self.contextual < 0
        ):
            raise ConfigError(f"contextual={self.contextual!r} must be a count of at least 0.")

    def default_layers(self, facts: Facts) -> tuple[int, ...]:
        return (facts.feature_block,)

    def needs(self, facts: Facts) -> tuple[Need, ...]:
        layers = self.used_layers(facts)
        return (*salience_needs(layers, facts), *(Keys(layer) for layer in layers[-1:]))

    def plan(self, facts: Facts) -> tuple[Stage, ...]:
        return (Stage(Site.ENCODER if facts.in_tower else Site.PROJECTOR, self.needs(facts)),)

    def select(self, signals: Signals, k: int) -> Selection:
        has_cls = signals.n_prefix > 0 and any(isinstance(n, ClsRow) for n in signals.values)
        n_merged = round(k * 5 / 32) if self.contextual is None else self.contextual
        n_top = k - n_merged - has_cls
        if n_top < 0:
            raise ConfigError(
                f"contextual={n_merged} leaves no room for dominant tokens in keep={k}."
            )
        (keys,) = signals.stack(Keys)
        return merge_rest(salience(signals), keys, n_top, n_merged, has_cls=has_cls)
