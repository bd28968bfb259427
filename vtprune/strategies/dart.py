"""DART: inside the language model keep a few pivots and the tokens least similar to them.

Pivots are the visual tokens, and the tokens after the image, with the largest L1 norm of their
keys; each takes the visual tokens still free whose normed hidden states resemble its own least. No
attention map is read. arXiv 2502.11494 (ZichenWen1/DART). Later layers run shorter. The authors
keep 4 + 8 * floor(budget / 8) tokens and visit pivots in the order of a Python set of their places:
``compat`` does both. Otherwise exactly the budget stays, and pivots come in the prompt's order.
Defaults: official code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vtprune.errors import ConfigError, InputError
from vtprune.kernels.row_pair_stats import cosine, row_pair_stats
from vtprune.scoring.pivots import largest, least_similar, set_order, shares
from vtprune.types import (
    Budget,
    Facts,
    KeyNorm,
    Normed,
    Positions,
    Scope,
    Selection,
    Signals,
    Site,
    Stage,
    Strategy,
)


@dataclass(frozen=True)
class DART(Strategy):
    """``layers`` holds the one layer before which tokens leave, by default 2 of 32 (K = 2).

    ``visual`` (>= 1) and ``text`` (>= 0) count the pivots; ``compat`` takes the authors' count and
    order. ``keep`` counts the tokens of a sample that enter that layer and all later ones.
    """

    positions: ClassVar[Positions] = "keep"
    acts_inside: ClassVar[bool] = True
    scope: ClassVar[Scope] = "sample"

    visual: int = 4
    text: int = 4
    compat: bool = False

    def __post_init__(self) -> None:
        for name, least in (("visual", 1), ("text", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"{name}={value!r} must be a count of at least {least}.")

    def default_layers(self, facts: Facts) -> tuple[int, ...]:
        return (facts.scale_decoder(2, 32),)

    def plan(self, facts: Facts) -> tuple[Stage, ...]:
        (layer,) = self.used_layers(facts)
        return (Stage(Site.DECODER, (KeyNorm(layer - 1), Normed(layer)), layer),)

    def counts(self, signals: Signals, budget: Budget) -> list[int]:
        count, pivots = budget.count(signals.n), self.visual + self.text
        if self.compat and count < signals.n:
            each = max(0, min(count, signals.n - self.visual)) // pivots
            count = min(self.visual + pivots * each, signals.n)
        return [count] * len(signals.tokens)

    def select(self, signals: Signals, k: int) -> Selection:
        (norms,), (states,), inside = signals.stack(KeyNorm), signals.stack(Normed), signals.inside
        after = inside.after if inside else ()
        starts = inside.starts if inside else ()
        if self.compat and not starts:
            raise InputError("compat=True needs signals.inside.starts: places decide on the order.")
        rows = []
        for b, (norm, state) in enumerate(zip(norms, states, strict=True)):
            visual = largest(norm, min(self.visual, k))
            words = {type(need): x for need, x in after[b].items()} if after else {}
            text = largest(words.get(KeyNorm, norm[:0]), self.text)
            pivots = torch.cat([state[visual], words.get(Normed, state[:0])[text]])
            places = torch.cat([visual, text + signals.n])  # in the order of the prompt
            order = set_order(places + starts[b]) if self.compat else places.argsort()
            pairs = [(state, pivot.expand_as(state)) for pivot in pivots[order]]
            similar = [cosine(*row_pair_stats(*pair)) for pair in pairs]
            counts = shares(k - len(visual), len(pivots))
            rows.append(least_similar(torch.stack(similar), counts, visual))
        return Selection(torch.stack(rows), signals.n)
