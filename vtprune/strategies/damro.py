"""DAMRO: the few tokens that [CLS] attends to most, as the view to decode against.

What [CLS] attends to in the last blocks are often outliers of the background, which language models
look at too and then say what is not there. A model that sees those alone says the same with more
certainty, so its logits are taken off those of the whole image: ``ContrastiveDecoder`` of
``vtprune.contrast`` does that with this view. By itself it prunes as any other, so that the prefill
gets shorter. EMNLP 2024, arXiv 2410.04514 (coder-gx/DAMRO). A tower without [CLS] uses attention
received instead. Of an image made of tiles only the base view is taken, as officially, but without
the newline behind it.
Defaults: official code; heads and order ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vtprune.errors import ConfigError
from vtprune.kernels.topk_sorted import ranked
from vtprune.scoring.attention import salience_needs
from vtprune.types import (
    ClsRow,
    Facts,
    Need,
    Newlines,
    Received,
    Selection,
    Signals,
    Strategy,
    Tile,
    WideClsRow,
)


@dataclass(frozen=True)
class DAMRO(Strategy):
    """``base``: of an image made of tiles, take tokens of the base view first.

    Without it they compete with those of the tiles, or by ``scope="tile"`` each tile has its own.
    ``compat``: heads joined into one as wide as all, and tokens by falling attention. So does the
    official code of LLaVA; that of InstructBLIP has the mean over heads, as is the default.
    """

    newlines: ClassVar[Newlines] = "row"

    base: bool = True
    compat: bool = False

    def default_layers(self, facts: Facts) -> tuple[int, ...]:
        return (facts.feature_block,)

    def needs(self, facts: Facts) -> tuple[Need, ...]:
        layers = self.used_layers(facts)
        tile = (Tile(facts.feature_block),) if self.base and Tile in facts.signals else ()
        if self.compat and facts.has_cls:
            return *tile, *(WideClsRow(layer) for layer in layers)
        return *tile, *salience_needs(layers, facts)

    def score(self, signals: Signals) -> Tensor:
        read = signals.stack(ClsRow, WideClsRow, Received)  # [L, B, N]
        scores = read.sum(0)
        for need, tile in signals.values.items():
            if isinstance(need, Tile):
                _check(tile)
                scores = scores - 2.0 * len(read) * (tile > 0)  # attention is at most 1
        return scores

    def select(self, signals: Signals, k: int) -> Selection:
        if not self.compat:
            return super().select(signals, k)
        return Selection(ranked(self.score(signals))[:, :k], signals.n)


def _check(tile: Tensor) -> None:
    """Raises ConfigError for a row ``[N]`` without a token of the base view."""
    if bool((tile > 0).all(1).any()):
        raise ConfigError(
            "damro takes tokens of the base view first, and some row (a tile, by scope='tile') has "
            "none of it. Give base=False too."
        )
