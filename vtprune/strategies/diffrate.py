"""DiffRate: in every block prune some patches and merge others, by counts that training has found.

Between attention and MLP patches are ranked by [CLS] attention: the last of them leave, those
before go each into the most similar of the first (cosine of the states, plain mean), which later
blocks attend to a little more, by how similar it was. arXiv 2305.17997 (OpenGVLab/DiffRate). The
rest of the tower, the projector and the prefill run on fewer tokens. The published lists of counts
hold without training; on towers of other depths or sizes they are read as shares of the patches at
shares of the depth. ``keep`` is what leaves the last block: a list goes as far as it needs for
that, by a power of its shares, and is as published for 2 of 196 patches in 12 blocks. Tokens are
back in the order of the image. A tower without [CLS] ranks by attention received; where a visual
token is made of several patches, projected tokens are pruned and merged in one go, by the attention
of the block that yields the features. Defaults: the official list of DeiT-S at 2.3 GFLOPs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vtprune.errors import ConfigError
from vtprune.kernels.topk_sorted import ranked
from vtprune.scoring.attention import salience_needs
from vtprune.scoring.rates import PUBLISHED, Rates
from vtprune.scoring.tails import merge_tail
from vtprune.strategies._blocks import InBlocks
from vtprune.types import (
    Budget,
    ClsRow,
    Facts,
    Received,
    Selection,
    Signals,
    TowerNeed,
)


@dataclass(frozen=True)
class DiffRate(InBlocks):
    """``layers`` are the blocks that it acts in, by default all up to that of the features.

    ``rates``: the list by model and GFLOPs (``deit_s_2.3``, ``deit_s_2.9``, ``deit_b_8.7``,
    ``deit_b_11.5``), or two of your own: how many tokens, [CLS] counted, pruning leaves in each
    block and then merging, of ``tokens`` that enter the first. ``prop_attn``: whether a merged
    token gets attention by its size.
    """

    rates: str | tuple[Sequence[int], Sequence[int]] = "deit_s_2.3"
    tokens: int = 197
    prop_attn: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.rates, str):
            if self.rates not in PUBLISHED or self.tokens != PUBLISHED[self.rates].tokens:
                raise ConfigError(
                    f"rates={self.rates!r} of tokens={self.tokens}: choose one of "
                    f"{', '.join(PUBLISHED)}, of 197; or give two lists of counts."
                )
            return
        given = self.rates if isinstance(self.rates, (list, tuple)) else ()
        if [isinstance(counts, (list, tuple)) for counts in given] != [True, True]:
            raise ConfigError(f"rates={self.rates!r}: give a name, or two lists of counts.")
        object.__setattr__(self, "rates", tuple(tuple(counts) for counts in given))
        _ = self.schedule

    @property
    def schedule(self) -> Rates:
        """The counts as they are scaled to any tower."""
        if isinstance(self.rates, str):
            return PUBLISHED[self.rates]
        prune, merge = self.rates
        return Rates(tuple(prune), tuple(merge), self.tokens)

    @property
    def weighs(self) -> bool:
        return self.prop_attn

    def read(self, layer: int, facts: Facts) -> tuple[TowerNeed, ...]:
        return salience_needs((layer,), facts)

    def counts(self, signals: Signals, budget: Budget) -> list[int]:
        if signals.inside is None:
            return super().counts(signals, budget)
        rates, (_, depth) = self.schedule, _depths(signals)
        entered = signals.inside.entered
        return [min(signals.n, rates.count(n, budget.count(n), depth)) for n in entered]

    def select(self, signals: Signals, k: int) -> Selection:
        score = signals.stack(ClsRow, Received)[-1]  # [B, N]
        size = torch.ones_like(score) if signals.size is None else signals.size
        pruned = round((signals.n - k) * self.schedule.pruned(*_depths(signals)))
        return merge_tail(ranked(score), k, pruned, signals.tokens, size)


def _depths(signals: Signals) -> tuple[float, float]:
    """Returns how deep the stage before is, and this one: shares of the way to the last stage."""
    inside = signals.inside
    if inside is None:
        return 0.0, 1.0
    way = inside.layers[-1] + 1
    before = inside.layers[inside.stage - 1] + 1 if inside.stage else 0
    return before / way, (inside.layers[inside.stage] + 1) / way
