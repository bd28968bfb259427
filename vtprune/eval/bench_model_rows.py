"""From the turns of a benchmark to its figures: spreads, ratios and the break-even token count."""

from __future__ import annotations

import statistics
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vtprune.eval._extras import need
from vtprune.eval.bench_kernels import quantiles

# What a call is made of, then a token after the first one, then the call as a whole.
PARTS = ("encoder", "scoring", "compaction", "prefill")
PHASES = (*PARTS, "decode_per_token", "end_to_end")
UNPRUNED, CONTROL = "none", "random"


@dataclass(frozen=True)
class Turn:
    """What one turn of a setting took: milliseconds by ``PHASES``, MiB at most (None on CPUs)."""

    ms: Mapping[str, float]
    mib: float | None = None

    @property
    def cost(self) -> float:
        """Milliseconds that a strategy adds."""
        return self.ms["scoring"] + self.ms["compaction"]


@dataclass
class Timed:
    """A strategy at a budget, and its turns by round; ``UNPRUNED`` first in its group.

    ``kept`` of ``visual_tokens`` enter a layer of the language model, on average. ``free`` is the
    prompt of free pruning that it is compared with, None where no token leaves. All are per row.
    """

    strategy: str
    budget: str
    visual_tokens: int
    kept: float
    free: int | None = None
    turns: list[Turn] = field(default_factory=list)


@dataclass
class Group:
    """Settings of one batch size and resolution, unpruned first.

    ``free`` has by the visual tokens per row of prompts that were short already, the whole one
    among them, the milliseconds of the prefill by round.
    """

    batch: int
    resolution: str
    settings: list[Timed] = field(default_factory=list)
    free: dict[int, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Spread:
    """Median, 20 % and 80 % quantile."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(*quantiles(values))


@dataclass(frozen=True)
class Row:
    """What is said of a setting; None where it means nothing, or was not measured.

    Attributes:
        over_free: scoring, compaction and prefill, as a multiple of the prefill of free pruning.
        over_unpruned: end to end, as a multiple of unpruned.
        over_random: end to end, as a multiple of ``random`` at the same budget.
        scoring_share: scoring as a share of the unpruned prefill.
        break_even: visual tokens of a row that must leave to earn scoring and compaction.
    """

    strategy: str
    budget: str
    batch: int
    resolution: str
    visual_tokens: int
    kept: float
    phases: Mapping[str, Spread]
    peak_mib: float | None
    over_free: float | None
    over_unpruned: float | None
    over_random: float | None
    scoring_share: float | None
    break_even: int | None


def rows_of(group: Group) -> list[Row]:
    """Returns a row per setting; ratios are medians of those within a round."""
    curve = fit({n: statistics.median(ms) for n, ms in group.free.items()})
    return [_row(group, setting, curve) for setting in group.settings]


def _row(group: Group, setting: Timed, curve: Sequence[float] | None) -> Row:
    unpruned = group.settings[0]
    turns = setting.turns
    mib = [turn.mib for turn in turns if turn.mib is not None]
    ours: dict[str, Any] = {}
    if setting is not unpruned:
        ours["over_unpruned"] = end_to_end(setting, unpruned)
        ours["scoring_share"] = ratio(
            [turn.ms["scoring"] for turn in turns], [turn.ms["prefill"] for turn in unpruned.turns]
        )
    if setting.free is not None:
        control = [
            one for one in group.settings if (one.strategy, one.budget) == (CONTROL, setting.budget)
        ]
        ours["over_random"] = end_to_end(setting, control[0]) if control else None
        ours["over_free"] = ratio(
            [turn.cost + turn.ms["prefill"] for turn in turns], group.free[setting.free]
        )
        cost = statistics.median(turn.cost for turn in turns)
        ours["break_even"] = break_even(curve, setting.visual_tokens, cost)
    nothing = dict.fromkeys(("over_free", "over_unpruned", "over_random", "break_even"))
    return Row(
        strategy=setting.strategy,
        budget=setting.budget,
        batch=group.batch,
        resolution=group.resolution,
        visual_tokens=setting.visual_tokens,
        kept=round(setting.kept, 2),
        phases={name: Spread.of([turn.ms[name] for turn in turns]) for name in PHASES},
        peak_mib=max(mib) if mib else None,
        **{**nothing, "scoring_share": None, **ours},
    )


def end_to_end(setting: Timed, other: Timed) -> float:
    """Returns the whole call of a setting as a multiple of another's."""
    pair = [[turn.ms["end_to_end"] for turn in one.turns] for one in (setting, other)]
    return ratio(*pair)


def ratio(ms: Sequence[float], of: Sequence[float]) -> float:
    """Returns the median of the ratios within a round."""
    return statistics.median(a / b for a, b in zip(ms, of, strict=True))


def fit(prefill: Mapping[int, float]) -> tuple[float, float, float] | None:
    """Returns ``a, b, c`` of ``a + b n + c n^2``, milliseconds of a prefill by visual tokens.

    Least squares with none of them negative: a longer prompt is never faster. None where there
    are not two lengths.
    """
    if len(prefill) < 2:
        return None
    unit = max(prefill)  # of like size, the columns fit in double precision
    shares = [n / unit for n in prefill]
    nnls = need("scipy.optimize", extra="eval").nnls
    (a, b, c), _ = nnls([[1.0, x, x * x] for x in shares], list(prefill.values()))
    return float(a), float(b) / unit, float(c) / unit**2


def break_even(curve: Sequence[float] | None, tokens: int, cost: float) -> int | None:
    """Returns how many of ``tokens`` must leave until the prefill is shorter by ``cost`` ms.

    None where that is not so even if all leave, or there is no curve.
    """
    if curve is None:
        return None
    _, b, c = curve

    def saved(gone: int) -> float:
        left = tokens - gone
        return b * gone + c * (tokens**2 - left**2)

    found = bisect_left(range(tokens + 1), cost, key=saved)
    return found if found <= tokens else None
