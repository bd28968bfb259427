"""ToDRE: keep a diverse subset, grown from the token that [CLS] attends to most.

Each pick has the lowest sum of cosine similarities to the picks before it, so the subset covers
the image; the prefill gets shorter, the vision tower runs in full. The paper's second stage is
``exit``: late in the language model all visual tokens of a sample leave, newlines too, if the words
after the image attend to them but little. arXiv 2505.18757 (no public code). The pivot comes from
the last block of the tower, without [CLS] from attention received (the paper takes any token
there). The paper leaves the order open: kept tokens stay in raster order and newlines are no
candidates. Its other condition, that image tokens attend to the text, never matters: text comes
after them. Defaults: the paper (second version), but the exit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from vtprune.errors import ConfigError
from vtprune.kernels.greedy_select import greedy_select
from vtprune.kernels.topk_sorted import topk_sorted
from vtprune.scoring.attention import salience, salience_needs
from vtprune.scoring.diversity import centers_from
from vtprune.types import (
    Budget,
    Facts,
    Need,
    Selection,
    Signals,
    Site,
    Stage,
    Strategy,
    TextRows,
)

Objective = Literal["max_sum", "max_min"]


@dataclass(frozen=True)
class ToDRE(Strategy):
    """``objective``: ``max_sum``, or ``max_min`` for the k-center of the paper's first version.

    ``thumbnail``: the pivot is among that many tokens from the first on, such as the base view of
    a tiled image; by default among all. ``exit``: whether all tokens leave before layer 28 of 32 of
    the language model where less than ``tau`` of the text's attention there is on them.
    """

    objective: Objective = "max_sum"
    thumbnail: int | None = None
    exit: bool = False
    tau: float = 0.10

    def __post_init__(self) -> None:
        if self.objective not in get_args(Objective):
            known = " or ".join(get_args(Objective))
            raise ConfigError(f"objective={self.objective!r} is unknown; choose {known}.")
        if self.thumbnail is not None and (isinstance(self.thumbnail, bool) or self.thumbnail < 1):
            raise ConfigError(f"thumbnail={self.thumbnail!r} must be a count of at least 1.")
        if not 0 <= self.tau <= 1:
            raise ConfigError(f"tau={self.tau!r} must be a share from 0 to 1.")

    def default_layers(self, facts: Facts) -> tuple[int, ...]:
        return (facts.vision_layers - 1,)

    def needs(self, facts: Facts) -> tuple[Need, ...]:
        return salience_needs(self.used_layers(facts), facts)

    def plan(self, facts: Facts) -> tuple[Stage, ...]:
        if not self.exit:
            return super().plan(facts)
        if facts.decoder_layers <= facts.first_stage:
            raise ConfigError(
                f"exit=True: {facts.family} has no layer of its language model before which tokens "
                "may leave; leave it out."
            )
        if self.exclude_sinks:
            raise ConfigError("exclude_sinks=True: sinks exit with all others; leave it out.")
        layer = facts.scale_decoder(28, 32)
        return (*super().plan(facts), Stage(Site.DECODER, (TextRows(layer),), layer))

    def counts(self, signals: Signals, budget: Budget) -> list[int]:
        if signals.inside is None:
            return super().counts(signals, budget)
        return [0 if share < self.tau else signals.n for share in attended(signals).tolist()]

    def select(self, signals: Signals, k: int) -> Selection:
        return Selection(self.picks(signals, k).sort(dim=1).values, signals.n)

    def picks(self, signals: Signals, k: int) -> Tensor:
        """Returns the tokens in the order in which they are picked, ``[B, k]``, the pivot first."""
        pivot = topk_sorted(salience(signals)[:, : self.thumbnail], 1)[:, 0]
        if self.objective == "max_min":
            return centers_from(pivot, signals.tokens, k)
        return greedy_select(signals.tokens, k, mode="max_sum", pivot=pivot)


def attended(signals: Signals) -> Tensor:
    """Returns the share of the text's attention that is on the visual tokens, ``[B]``."""
    return signals.stack(TextRows)[-1].sum(1)
