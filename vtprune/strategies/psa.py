"""PSA: while the prompt is read look at keys whole, as means of 2, 4 or 8, or not at all.

In each layer and head blocks of queries rate blocks of keys by antidiagonals of their products;
those that hold most of it are seen whole, the next ones as means, which count for all that they are
made of, and the last ones not. The text after the image, the first block and each block's own are
always whole, and keys that are not alike stay finer. arXiv 2512.04025
(ziplab/Pyramid-Sparse-Attention). Saved is attention of long prompts, where the kernel runs; the
report says how much of it was computed. Tokens decoded later see all. The official code counts the
last 512 tokens as text. Defaults: official code (its Qwen2.5-VL example).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from vtprune.errors import ConfigError
from vtprune.kernels.psa_attention import psa_attention
from vtprune.scoring.pyramid import coarsest, density, importance, levels_of
from vtprune.strategies._compute import Compute
from vtprune.types import Facts, SparsePrefill


@dataclass(frozen=True)
class PSA(Compute):
    """``bounds``: up to which share of a row's importance blocks are whole, or means of 2, 4, 8.

    ``block``: tokens per block, a multiple of 8 and of ``stride``, of the squares whose
    antidiagonals tell importance. ``alike``: whether keys that differ stay finer than their
    importance would have them. ``text``: how many tokens at the end are text; None = those after
    the last visual one.
    """

    bounds: tuple[float, float, float, float] = (0.7, 0.8, 0.9, 0.9)
    block: int = 128
    stride: int = 8
    alike: bool = True
    text: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "bounds", tuple(self.bounds))
        steps = zip((0.0, *self.bounds), (*self.bounds, 1.0), strict=True)
        if len(self.bounds) != 4 or not all(a <= b for a, b in steps):
            raise ConfigError(f"bounds={self.bounds} must be 4 shares of 0 to 1 that do not fall.")
        for name in ("block", "stride"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ConfigError(f"{name}={value!r} must be a number of tokens of at least 1.")
        if self.block % 8 or self.block % self.stride:
            raise ConfigError(
                f"block={self.block} must be a multiple of 8 and of stride={self.stride}."
            )
        if self.text is not None and (type(self.text) is not int or self.text < 0):
            raise ConfigError(f"text={self.text!r} must be a number of tokens from 0 on, or None.")

    def rule(self, layer: int, facts: Facts) -> SparsePrefill:
        return SparsePrefill(self)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, after: int
    ) -> tuple[Tensor, Tensor] | None:
        """Returns attention of one prompt and its density; None where all blocks are whole."""
        levels = self.levels(q, k, scale, after)
        if levels is None:
            return None
        return psa_attention(q, k, v, levels, self.block, scale), density(levels)

    def levels(self, q: Tensor, k: Tensor, scale: float | None, after: int) -> Tensor | None:
        """Returns the level of each pair of blocks, ``[1, H, n, n]``; None = all are whole."""
        length, width = q.shape[2:]
        text = min(length, after if self.text is None else self.text)
        blocks = -(-length // self.block)
        text_blocks = blocks - (length - text) // self.block if text else 0
        if blocks - text_blocks <= 2:  # the first one, and the second by itself
            return None
        groups = q.shape[1] // k.shape[1]
        queries = q if scale is None else q * (scale * width**0.5)
        keys = k.repeat_interleave(groups, dim=1)
        # Up to all of it is without a bound: shares are sums, which may come out above 1.
        first, second, third, last = (x if x < 1 else math.inf for x in self.bounds)
        bounds = {1: (0.0, first), 2: (first, second), 4: (second, third), 8: (third, last)}
        levels = levels_of(importance(queries, keys, self.block, self.stride), bounds, text_blocks)
        if not self.alike:
            return levels
        finest = coarsest(k, self.block).repeat_interleave(groups, dim=1)
        return levels.minimum(finest[..., None, :])
