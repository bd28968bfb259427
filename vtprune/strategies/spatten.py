"""SpAtten: patches that have received least attention so far leave, a few in every block.

What a patch receives is added up over all heads, queries and blocks up to that one; after the first
15 % of the blocks patches leave between attention and MLP, equally many in each. arXiv 2012.09852
(mit-han-lab/spatten, whose code is of language models and another rule, for their caches). With
``heads`` below 1 heads go the same way, in each image those of least output so far, after the
first 30 %; with ``values`` each query reads the values of its likeliest keys only. What these would
save on the authors' hardware is not saved here: heads are set to zero, and values left out of a
whole map, so reports give their operations as theoretical. ``bits`` simulates progressive
quantisation, which saves nothing here. The authors find their ratios by search and train the model
with them; here heads, values and bits are whole unless asked for. Defaults: the paper.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtprune.attending import Attended, Attending, gathered
from vtprune.errors import ConfigError
from vtprune.kernels._common import full_precision
from vtprune.scoring.connectivity import highest
from vtprune.scoring.heads import given_by, important, n_left, progressive
from vtprune.scoring.schedule import Falling
from vtprune.types import (
    Attention,
    AttentionRule,
    Budget,
    Facts,
    Need,
    Scope,
    Signals,
    Site,
    Stage,
    Strategy,
    TotalReceived,
)

WHOLE_TOKENS, WHOLE_HEADS = 0.15, 0.3  # of the blocks, the first ones
GIVEN, ALIVE = "given", "alive"


@dataclass(frozen=True)
class Pruned(AttentionRule):
    """The attention of a block, without some heads, values or bits.

    ``heads``: the share that is left in it; ``values``, ``bits``, ``flat`` as of the strategy.
    """

    heads: float = 1.0
    values: float = 1.0
    bits: tuple[int, int] | None = None
    flat: float = 0.1

    def attend(self, given: Attending) -> Attended:
        q, v = given.q, given.v
        batch, n_heads, n, _ = q.shape
        alive = given.rows.get(ALIVE, torch.ones(batch, n_heads, dtype=torch.bool, device=q.device))
        total = given.rows.get(GIVEN, torch.zeros(batch, n_heads, device=q.device))
        left = n_left(self.heads, n_heads)
        alive = important(total, alive, left)
        map = self._map(given) * alive[:, :, None, None]
        n_read = math.ceil(self.values * n)
        out = gathered(highest(map, n_read, zero=0.0) if n_read < n else map, v)
        rows = {ALIVE: alive, GIVEN: total + given_by(out, given.real)}
        share = left / n_heads * (1 + n_read / n) / 2
        return Attended(out, rows=rows, map=map, share=share)

    def _map(self, given: Attending) -> Tensor:
        if self.bits is None:
            return given.logits().softmax(-1)
        bias = torch.zeros((), device=given.q.device) if given.bias is None else given.bias.float()
        with full_precision(given.q):
            return progressive(given.q, given.k, self.bits, self.flat, bias)


@dataclass(frozen=True)
class SpAtten(Strategy):
    """``layers`` are the blocks in which patches leave.

    ``heads``: the share of the heads that is left in the last block (0.75 is 1.1 times fewer in
    all, the paper's average). ``values``: the share of the keys whose values a query reads.
    ``bits``: those of queries and keys that are read first, and those that are read too where no
    key gets more than ``flat`` of a query's attention; (6, 4) or (8, 4) in the paper. Values have
    them all. None = no rounding.
    """

    scope: ClassVar[Scope] = "tile"

    heads: float = 1.0
    values: float = 1.0
    bits: tuple[int, int] | None = None
    flat: float = 0.1

    def __post_init__(self) -> None:
        for name, share in {"heads": self.heads, "values": self.values}.items():
            if not 0 < share <= 1:
                raise ConfigError(f"{name}={share} is no share; give one above 0 and up to 1.")
        if not 0 <= self.flat <= 1:
            raise ConfigError(f"flat={self.flat} is no share of attention; give one from 0 to 1.")
        bits = self.bits
        whole = isinstance(bits, tuple) and len(bits) == 2 and all(type(n) is int for n in bits)
        if bits is not None and not (whole and bits[0] >= 2 and bits[1] >= 0 and sum(bits) <= 16):
            raise ConfigError(
                f"bits={bits!r}: give those read first (2 or more) and those read on demand (0 or "
                "more), 16 together at most, such as (6, 4)."
            )

    def default_layers(self, facts: Facts) -> tuple[int, ...]:
        first = math.ceil(WHOLE_TOKENS * facts.vision_layers)
        last = facts.feature_block
        return tuple(range(min(first if facts.in_tower else last, last), last + 1))

    def read(self, layer: int, facts: Facts) -> tuple[Need, ...]:
        """Returns what patches have received up to a block."""
        blocks = sorted({facts.readable(i) for i in range(layer + 1)})
        return tuple(TotalReceived(i) for i in blocks if i <= layer)

    def needs(self, facts: Facts) -> tuple[Need, ...]:
        return self.read(self.used_layers(facts)[-1], facts)

    @property
    def changes(self) -> bool:
        """Whether attention itself is another."""
        return self.heads < 1 or self.values < 1 or self.bits is not None

    def plan(self, facts: Facts) -> tuple[Stage, ...]:
        layers = self.used_layers(facts)
        if not facts.in_tower and not self.changes:
            return (Stage(Site.PROJECTOR, self.needs(facts)),)
        blocks = range(facts.vision_layers) if self.changes else layers
        return tuple(self._stage(i, layers, facts) for i in blocks)

    def _stage(self, layer: int, layers: tuple[int, ...], facts: Facts) -> Stage:
        needs, rule = self.read(layer, facts), None
        if self.changes:
            needs, rule = (Attention(), *needs), self._rule(layer, facts.vision_layers)
        part = Falling(sum(i <= layer for i in layers), len(layers))
        return Stage(Site.ENCODER, needs, layer, part, before_mlp=True, attend=rule)

    def _rule(self, layer: int, depth: int) -> Pruned:
        whole = math.ceil(WHOLE_HEADS * depth)
        done = max(0, layer + 1 - whole) / max(1, depth - whole)
        return Pruned(1 - (1 - self.heads) * done, self.values, self.bits, self.flat)

    def counts(self, signals: Signals, budget: Budget) -> list[int]:
        inside = signals.inside
        if inside is None:
            return super().counts(signals, budget)
        return [min(signals.n, budget.count(n)) for n in inside.entered]

    def score(self, signals: Signals) -> Tensor:
        received = signals.stack(TotalReceived)  # [L, B, N]
        return sum(received[1:], received[0])  # one by one, so that equal tokens stay equal
