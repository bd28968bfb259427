"""Sinks out of the way of stages that keep what attention goes to: they stay only if others lack.

A sink draws attention whatever it shows (arXiv 2503.03321), so a score of attention keeps it. Such
a stage is shown the other tokens alone; sinks leave first, and nothing is merged into or of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from vtprune.errors import ConfigError, InputError
from vtprune.scoring.sinks import find_sinks
from vtprune.types import (
    Attended,
    Facts,
    FirstState,
    RowNeed,
    Selection,
    Signals,
    Site,
    Stage,
    Strategy,
)


def stages_of(strategy: Strategy, facts: Facts) -> tuple[Stage, ...]:
    """Returns the stages of a strategy, with what telling sinks takes where it excludes them.

    Raises:
        ConfigError: ``exclude_sinks`` of a strategy that reads no attention inside the language
            model, or what is no bool.
    """
    if not isinstance(strategy.exclude_sinks, bool):
        raise ConfigError(f"exclude_sinks={strategy.exclude_sinks!r} must be True or False.")
    stages = strategy.plan(facts)
    if not strategy.exclude_sinks:
        return stages
    found = tuple(_telling(stage) for stage in stages)
    if found == stages or strategy.kind not in ("select", "adaptive"):  # others: all or none
        raise ConfigError(
            f"exclude_sinks=True: {strategy.name} keeps nothing for the attention it gets inside "
            "the language model. Leave it out, or use a strategy that does, such as 'fastv'."
        )
    return found


def _telling(stage: Stage) -> Stage:
    reads = any(isinstance(need, Attended) for need in stage.needs)
    if stage.site is not Site.DECODER or not stage.lets_leave or not reads:
        return stage
    return replace(stage, needs=(*stage.needs, FirstState(stage.layer or 0)))


def excludes(strategy: Strategy, signals: Signals) -> bool:
    """Returns whether sinks are to be told among these tokens."""
    told = any(isinstance(need, FirstState) for need in signals.values)
    return strategy.exclude_sinks and told


def among_others(
    signals: Signals, k: int, choose: Callable[[Signals], Selection]
) -> tuple[Tensor, Selection | None]:
    """Returns the tokens of one row that may be kept, ascending, and what was chosen of them.

    None = all of them; where these are fewer than ``k``, the first sinks are among them.

    Args:
        signals: of one row of N tokens, with a ``FirstState``.
        choose: chooses ``k`` of more tokens.

    Raises:
        InputError: several rows.
    """
    if len(signals.tokens) != 1:
        raise InputError(
            f"exclude_sinks=True: {len(signals.tokens)} rows have different numbers of sinks. "
            "Select each row on its own, with signals.rows(index)."
        )
    first = signals.stack(FirstState)[-1][:, None]  # [1, 1, D]
    hidden = torch.cat([first.to(signals.tokens), signals.tokens], dim=1)
    leading = torch.arange(hidden.shape[1], device=hidden.device)[None] == 0
    sinks = find_sinks(hidden, leading, None)[0, 1:]
    others = (~sinks).nonzero()[:, 0]
    if len(others) <= k:
        more = sinks.nonzero()[: k - len(others), 0]
        return torch.cat([others, more]).sort().values, None
    return others, choose(_at(signals, others))


def _at(signals: Signals, places: Tensor) -> Signals:
    """Returns the signals of tokens ``places`` ``[m]``."""
    if len(places) == signals.n:
        return signals
    values = {
        need: value if isinstance(need, RowNeed) else value[:, places]
        for need, value in signals.values.items()
    }
    size = None if signals.size is None else signals.size[:, places]
    tokens = signals.tokens[:, places]
    return replace(signals, tokens=tokens, grid=None, values=values, size=size, groups=())
