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
from typing import ClassVar

from torch import Tensor

from vtprune.kernels.topk_sorted import topk_sorted
from vtprune.scoring.clustering import recycle
from vtprune.scoring.raters import raters
from vtprune.strategies._staged import Staged
from vtprune.types import EachText, Likeness, Quantity, Selection, Signals


@dataclass(frozen=True)
class SparseVLM(Staged):
    """``layers``, by default 3, 7 and 16 of 32, and ``ratios`` as in ``Staged``.

    ``recycle``: whether some of the tokens left are means of dropped ones.
    """

    before: ClassVar[tuple[int, ...]] = (3, 7, 16)

    ratios: tuple[float, ...] = (309 / 576, 204 / 576, 113 / 576)
    recycle: bool = True

    def read(self, at: int, first: int) -> tuple[Quantity, ...]:
        return Likeness(0), *self.attention(at - 1)

    def attention(self, layer: int) -> tuple[Quantity, ...]:
        """Returns what is read of the layer after which tokens leave."""
        return (EachText(layer),)

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
