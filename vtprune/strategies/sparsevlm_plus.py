"""SparseVLM+: the raters' attention free of distance, in the heads that look at the image most.

Second version of SparseVLM: attention is divided by what the rotary embedding makes of queries and
keys of ones, so that tokens far from the text are not worse off; the heads are kept in which the
raters then attend most to the image, and nothing is recycled. Tokens leave after three layers, the
prefill gets shorter. arXiv 2410.04417 (Gumpest/SparseVLMs, v2.0). As in the official code
survivors keep their position ids. There the divisor becomes negative far away (from 1707 tokens on
with LLaVA-1.5's rotary embedding), which is ``compat``; here it ends at 0.5.
Defaults: official code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vtprune.errors import ConfigError
from vtprune.kernels.topk_sorted import topk_sorted
from vtprune.scoring.raters import distance_bias, raters
from vtprune.strategies.sparsevlm import SparseVLM
from vtprune.types import EachHead, Positions, Quantity, Signals, Turned


@dataclass(frozen=True)
class SparseVLMPlus(SparseVLM):
    """``ratios``, ``recycle`` and layers as in ``SparseVLM``; ``heads``: how many are kept.

    ``compat`` lets the divisor become negative, as the official code does.
    """

    positions: ClassVar[Positions] = "keep"

    ratios: tuple[float, ...] = (300 / 576, 200 / 576, 118 / 576)
    recycle: bool = False
    heads: int = 14
    compat: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.heads, bool) or self.heads < 1:
            raise ConfigError(f"heads={self.heads!r} must be a count of at least 1.")

    def attention(self, layer: int) -> tuple[Quantity, ...]:
        return EachHead(layer), Turned(layer)

    def rating(self, signals: Signals) -> Tensor:
        each = self.per_head(signals)
        heads = self.best(each)[:, None].expand(-1, each.shape[1], -1)
        return each.gather(2, heads).mean(2)

    def per_head(self, signals: Signals) -> Tensor:
        """Returns the raters' mean attention to each token in each head, ``[B, N, H]`` float32."""
        attention = signals.stack(EachHead)[-1]  # [B, N, T, H]
        chosen = raters(signals, attention.shape[2])[:, None]
        bias = distance_bias(signals, attention.shape[2], signed=self.compat)  # [B, N, T]
        weight = chosen / chosen.sum(2, keepdim=True) / bias
        return (attention * weight[..., None]).sum(2)

    def best(self, each: Tensor) -> Tensor:
        """Returns the heads of ``[B, N, H]`` that see most of the image, ``[B, h]`` int64."""
        return topk_sorted(each.nan_to_num(0.0).sum(1), min(self.heads, each.shape[2]))
