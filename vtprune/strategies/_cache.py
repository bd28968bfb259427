"""Base of strategies that let every token be read and shorten the caches before decoding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from vtprune.evicting import Entries, Kept
from vtprune.strategies._compute import InEachLayer
from vtprune.types import Budget, Facts, Site, Stage


@dataclass(frozen=True)
class Cached(InEachLayer):
    """``layers`` are those whose cache holds less.

    ``keep`` counts the visual tokens of a sample that each key/value head holds there.
    """

    kind: ClassVar[Literal["cache"]] = "cache"

    def stage(self, layer: int, facts: Facts) -> Stage:
        return Stage(Site.DECODER, layer=layer, evict=self)

    def evict(self, entries: Entries, budget: Budget) -> Kept | None:
        """Returns what a layer's cache holds of one prompt; None = all."""
        raise NotImplementedError(f"{type(self).__name__} must define evict().")
