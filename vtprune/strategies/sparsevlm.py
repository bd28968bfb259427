"""SparseVLM: let the words that the image speaks to rate visual tokens, and recycle what leaves.

Raters are the text tokens after the image that visual tokens are more like than the mean, among the
embeddings that enter the language model. After three of its layers the tokens that raters attend to
most in that layer are kept; of the others the best are clustered around density peaks, and each
cluster is averaged into one token. arXiv 2410.04417 (Gumpest/SparseVLMs, v1.5). As in the official
code merged tokens come last and positions are renumbered. Its random noise breaks ties of density;
here the lower index does. Its tables of counts are for three budgets; the ratios here are of the
one named 192, the mean of what leaves a layer (0.359 of all tokens enter one), and other budgets
take powers of them.
Defaults: official code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from vtprune.errors import ConfigError
from vtprune.kernels.topk_sorted import topk_sorted
from vtprune.scoring.clustering import recycle
from vtprune.scoring.raters import raters
from vtprune.scoring.schedule import check_mean, staged_counts
from vtprune.types import (
    Budget,
    EachText,
    Facts,
    Likeness,
    Quantity,
    Scope,
    Selection,
    Signals,
    Site,
    Stage,
    Strategy,
)


@dataclass(frozen=True)
class SparseVLM(Strategy):
    """``layers`` are those before which tokens leave, by default 3, 7 and 16 of 32.

    ``ratios`` say what is left of all visual tokens before each, the last ones where there are
    fewer layers. ``keep`` is the mean number of visual tokens that enter a layer: the ratios get
    the power that leads there. ``recycle``: whether some of those left are means of dropped ones.
    """

    kind: ClassVar[Literal["adaptive"]] = "adaptive"
    acts_inside: ClassVar[bool] = True
    scope: ClassVar[Scope] = "sample"

    ratios: tuple[float, ...] = (309 / 576, 204 / 576, 113 / 576)
    recycle: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "ratios", tuple(self.ratios))
        steps = zip((1.0, *self.ratios), self.ratios, strict=False)
        if not self.ratios or not all(1 >= a > b > 0 for a, b in steps):
            raise ConfigError(f"ratios={self.ratios} must fall, from below 1 to above 0.")

    def default_layers(self, facts: Facts) -> tuple[int, ...]:
        return tuple(sorted({facts.scale_decoder(layer, 32) for layer in (3, 7, 16)}))

    def plan(self, facts: Facts) -> tuple[Stage, ...]:
        layers = self.used_layers(facts)
        if len(layers) > len(self.ratios):
            raise ConfigError(f"layers={layers} need as many ratios; given are {self.ratios}.")
        return tuple(Stage(Site.DECODER, (Likeness(0), *self.read(at - 1)), at) for at in layers)

    def read(self, layer: int) -> tuple[Quantity, ...]:
        """Returns what is read of the layer after which tokens leave."""
        return (EachText(layer),)

    def check_budget(self, budget: Budget, facts: Facts) -> None:
        check_mean(budget, self.used_layers(facts)[0], facts, self.name)

    def counts(self, signals: Signals, budget: Budget) -> list[int]:
        n_stages = len(signals.inside.layers) if signals.inside else 1
        return staged_counts(signals, budget, self.ratios[-n_stages:], self.name)

    def select(self, signals: Signals, k: int) -> Selection:
        rating = self.rating(signals)
        if self.recycle:
            return recycle(rating, signals.tokens, k)
        return Selection(topk_sorted(rating, k), signals.n)

    def rating(self, signals: Signals) -> Tensor:
        """Returns the mean attention of the raters to each token, ``[B, N]`` float32."""
        attention = signals.stack(EachText)[-1]  # [B, N, T]
        weight = raters(signals, attention.shape[2])[:, None]
        return (attention * weight).sum(2) / weight.sum(2)
