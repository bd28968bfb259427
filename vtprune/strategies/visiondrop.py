"""VisionDrop: rank visual tokens by each other alone, and merge the rest, in the tower and after.

Before the language model as VisionZip: [CLS] attention picks the dominant tokens, the others are
merged by key similarity around evenly spaced targets. Then three times inside it, each time by the
attention of all visual tokens (causal, as the layer has it) and by the keys after the rotary
embedding. No word is asked, so what stays serves any question. arXiv 2506.22283
(Ruixxxx/VisionDrop). As in the official code a merged token is its target plus the mean of those
assigned to it, which ``merge="mean"`` averages, merged tokens come last, and positions are
renumbered from each stage on. The authors state counts for one budget; here all stages scale with
it. Where a visual token is made of several patches the first stage acts after the projector.
Defaults: official scripts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from vtprune.errors import ConfigError
from vtprune.scoring.attention import salience, salience_needs
from vtprune.scoring.contextual import merge_rest
from vtprune.scoring.schedule import Part
from vtprune.types import (
    Budget,
    ClsRow,
    Facts,
    Keys,
    LayerKeys,
    Need,
    Scope,
    Selection,
    Signals,
    Site,
    Stage,
    Strategy,
    VisualRows,
)

Merge = Literal["add", "mean"]


@dataclass(frozen=True)
class VisionDrop(Strategy):
    """``ratios``: what the stages leave, in proportion; tokens leave before 8, 16 and 24 of 32.

    ``contextual``: merged tokens of each stage; by default 1 of 8, later 1 of 7. ``merge``: ``add``
    their mean to a target, or take the ``mean`` of all. ``layers`` are blocks of the tower to read.
    ``keep`` is the mean number of visual tokens that enter a layer of the language model.
    """

    scope: ClassVar[Scope] = "tile"

    ratios: tuple[float, ...] = (1.0, 0.735, 0.735**2, 0.735**3)
    contextual: tuple[int, ...] | None = None
    merge: Merge = "add"

    def __post_init__(self) -> None:
        if len(self.ratios) != 4 or not all(0 < ratio <= 1 for ratio in self.ratios):
            raise ConfigError(f"ratios={self.ratios} must be four numbers above 0, up to 1.")
        merged = self.contextual
        if merged is not None and (len(merged) != 4 or not all(n >= 0 for n in merged)):
            raise ConfigError(f"contextual={merged} must be four counts of at least 0.")
        if self.merge not in get_args(Merge):
            raise ConfigError(f"merge={self.merge!r} is unknown; choose 'add' or 'mean'.")

    def default_layers(self, facts: Facts) -> tuple[int, ...]:
        return (facts.feature_block,)

    def needs(self, facts: Facts) -> tuple[Need, ...]:
        layers = self.used_layers(facts)
        return (*salience_needs(layers, facts), *(Keys(layer) for layer in layers[-1:]))

    def plan(self, facts: Facts) -> tuple[Stage, ...]:
        ratios = {-1: self.ratios[0]}  # by layer; of two stages in one place the later counts
        if facts.decoder_layers > facts.first_stage:
            ratios |= {
                facts.scale_decoder(layer, 32): ratio
                for layer, ratio in zip((8, 16, 24), self.ratios[1:], strict=True)
            }
        _, *layers = ratios
        depth = max(1, facts.decoder_layers)
        parts = [Part(tuple(ratios.values()), tuple(layers), depth, i) for i in range(len(ratios))]
        site = Site.ENCODER if facts.in_tower else Site.PROJECTOR
        return (
            Stage(site, self.needs(facts), times=parts[0]),
            *(
                Stage(Site.DECODER, (VisualRows(layer), LayerKeys(layer)), layer, part)
                for layer, part in zip(layers, parts[1:], strict=True)
            ),
        )

    def counts(self, signals: Signals, budget: Budget) -> list[int]:
        if signals.inside is None:
            return super().counts(signals, budget)
        wanted = [sum(map(budget.count, images)) for images in signals.inside.images]
        return [min(signals.n, count) for count in wanted]

    def select(self, signals: Signals, k: int) -> Selection:
        mean, inside = self.merge == "mean", signals.inside
        if inside is not None:
            score, keys = signals.stack(VisualRows)[-1], signals.stack(LayerKeys)[-1]
            n_merged = self._merged(k, k, inside.stage + 1, 7)
            return merge_rest(score, keys, k - n_merged, n_merged, mean=mean)
        has_cls = signals.n_prefix > 0 and any(isinstance(n, ClsRow) for n in signals.values)
        n_merged = self._merged(k, k - has_cls, 0, 8)
        (keys,) = signals.stack(Keys)
        n_top = k - n_merged - has_cls
        return merge_rest(salience(signals), keys, n_top, n_merged, has_cls=has_cls, mean=mean)

    def _merged(self, k: int, most: int, stage: int, share: int) -> int:
        """Returns how many of ``k`` tokens are merged ones, at ``most`` so many."""
        return min(most, round(k / share) if self.contextual is None else self.contextual[stage])
