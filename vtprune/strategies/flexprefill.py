"""FlexPrefill: while the prompt is read see only the blocks of keys that a head's queries need.

In each layer and head the last block of queries tells whether means of keys explain what it attends
to: then each block of queries sees the blocks that its own mean asks for, else the columns and the
distances to which most attention goes. arXiv 2502.20766 (bytedance/FlexPrefill). Saved is attention
of long prompts, where the kernel runs; the report says how much of it was computed. Tokens decoded
later see all. Defaults: official code.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vtprune.errors import ConfigError
from vtprune.kernels.psa_attention import psa_attention
from vtprune.scoring.flexprefill import blocks_seen
from vtprune.scoring.pyramid import density
from vtprune.strategies._compute import Compute
from vtprune.strategies._sinks import check_share
from vtprune.types import Facts, SparsePrefill


@dataclass(frozen=True)
class FlexPrefill(Compute):
    """``gamma``: the share of attention that what is seen covers.

    ``tau``: the distance below which means of keys explain what is attended to. ``block``: tokens
    per block, a multiple of 8. ``min_budget``: tokens that a head sees at least, a multiple of
    ``block``; prompts up to it, or of two blocks, are seen whole.
    """

    gamma: float = 0.9
    tau: float = 0.1
    block: int = 128
    min_budget: int = 512

    def __post_init__(self) -> None:
        check_share("gamma", self.gamma)
        check_share("tau", self.tau)
        if type(self.block) is not int or self.block < 1 or self.block % 8:
            raise ConfigError(f"block={self.block!r} must be a multiple of 8.")
        budget = self.min_budget
        if type(budget) is not int or budget < self.block or budget % self.block:
            raise ConfigError(f"min_budget={budget!r} must be a multiple of block={self.block}.")

    def rule(self, layer: int, facts: Facts) -> SparsePrefill:
        return SparsePrefill(self)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, after: int
    ) -> tuple[Tensor, Tensor] | None:
        """Returns attention of one prompt and its density; None where all is seen."""
        length, width = q.shape[2:]
        if length <= max(2 * self.block, self.min_budget):
            return None
        queries = q if scale is None else q * (scale * width**0.5)
        least = self.min_budget // self.block
        seen = blocks_seen(queries, k, self.block, self.gamma, self.tau, least)
        return psa_attention(q, k, v, seen, self.block, scale), density(seen)
