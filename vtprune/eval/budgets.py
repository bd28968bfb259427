"""What a sweep measures: budgets as users write them, and points of strategy and budget."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vtprune.errors import ConfigError
from vtprune.registry import build, strategy_names
from vtprune.registry import spell as spell_strategy
from vtprune.setting import Setting, is_setting, read_setting
from vtprune.types import Budget

UNPRUNED, BLIND = "unpruned", "blind"
REDUCE = "reduce="  # begins budgets of what leaves
STRATEGIES = ("random", "strided", "fastervlm", "vtc_cls", "divprune", "visionzip", "fastv")
VIT_STRATEGIES = ("random", "strided", "fastervlm", "tome")
BUDGETS = ("100%", "50%", "25%", "12.5%", "6.25%")


@dataclass(frozen=True)
class Point:
    """One strategy at one budget.

    ``budget`` is text as ``spell`` writes it, or ``reduce=8``, ``reduce=0.5`` as ``parse_reduce``
    reads what comes after the sign.
    """

    strategy: str
    budget: str


CEILING, FLOOR = Point(UNPRUNED, "100%"), Point(BLIND, "0%")


def parse_keep(text: str) -> int | float:
    """Returns a token count (int) or a share (float).

    A whole number is tokens, a number with a point or a per cent sign is a share: ``64`` is 64
    tokens, ``0.25`` and ``25%`` a quarter, ``1`` one token, ``100%`` all.

    Raises:
        ConfigError: the text is none of these, or out of range.
    """
    clean = text.strip()
    if re.fullmatch(r"\d+", clean):
        keep: int | float = int(clean)
    elif re.fullmatch(r"\d*\.?\d+\s*%", clean):
        keep = float(clean.rstrip("% ")) / 100
    elif re.fullmatch(r"\d*\.\d+", clean):
        keep = float(clean)
    else:
        raise ConfigError(
            f"Budget {text!r} is not understood. Give a number of tokens such as 64, or a share "
            "such as 0.25 or 25%."
        )
    try:
        Budget.of(keep)
    except ConfigError as error:
        raise ConfigError(f"Budget {text!r}: {error}") from None
    return keep


def parse_reduce(text: str) -> int | float:
    """Returns what leaves a ViT: tokens per block (int), or the share of FLOPs saved (float).

    A whole number is tokens, a number with a point or a per cent sign is a share.

    Raises:
        ConfigError: the text is none of these, or out of range.
    """
    clean, share = text.strip(), None
    if re.fullmatch(r"\d+", clean):
        return int(clean)
    if re.fullmatch(r"\d*\.?\d+\s*%", clean):
        share = float(clean.rstrip("% ")) / 100
    elif re.fullmatch(r"\d*\.\d+", clean):
        share = float(clean)
    if share is None or not 0 < share < 1:
        raise ConfigError(
            f"--reduce {text!r} is not understood. Give tokens that leave in every block, such as "
            "8, or the share of FLOPs that is saved, such as 0.5 or 50%."
        )
    return share


def parse_budget(text: str) -> dict[str, Any]:
    """Returns the arguments of ``wrap`` that a point's budget means."""
    if text.startswith(REDUCE):
        return {"reduce": parse_reduce(text.removeprefix(REDUCE))}
    return {"keep": parse_keep(text)}


def spell(keep: int | float) -> str:
    """Returns the one spelling of a budget: ``64`` for tokens, ``25%`` for a share."""
    return str(keep) if isinstance(keep, int) else f"{100 * keep:.6g}%"


def split(text: str) -> tuple[str, ...]:
    """Returns the entries of a comma-separated list, each once, in order.

    A comma between brackets separates nothing.
    """
    parts, depth = [""], 0
    for mark in text:
        depth += (mark in "([") - (mark in ")]")
        if mark == "," and depth <= 0:
            parts.append("")
        else:
            parts[-1] += mark
    return tuple(dict.fromkeys(part.strip() for part in parts if part.strip()))


def check_strategies(names: Sequence[str]) -> tuple[str, ...]:
    """Returns the names, with ``all`` replaced by every strategy there is.

    They may have options: ``zipvl(tau=0.96)``.

    Raises:
        ConfigError: no name, or an unknown one.
    """
    if not names:
        raise ConfigError(f"No strategy was given. Known: {', '.join(strategy_names())}, or 'all'.")
    wanted = [found for name in names for found in (strategy_names() if name == "all" else [name])]
    for name in wanted:
        build(name)
    return tuple(dict.fromkeys(map(spell_strategy, wanted)))


def point_of(setting: Setting) -> Point:
    """Returns the point that a setting from a file means.

    Raises:
        ConfigError: its strategy or an option is unknown, or its budget is missing or too much.
    """
    computes = build(setting.spelled).kind == "compute"
    if computes != (setting.keep is None and setting.reduce is None):
        said = "lets no token leave; leave keep out" if computes else "needs keep, as in keep: 64"
        raise ConfigError(f"The setting's strategy {setting.strategy} {said}.")
    if setting.reduce is not None:
        return Point(setting.spelled, f"{REDUCE}{setting.reduce}")
    return Point(setting.spelled, "100%" if setting.keep is None else spell(setting.keep))


def points(
    strategies: Sequence[str],
    budgets: Sequence[str],
    reduces: Sequence[str] = (),
    *,
    blind: bool = True,
) -> list[Point]:
    """Returns ceiling, floor (if ``blind``), and each strategy at each budget below 100 %.

    ``reduces`` are further budgets, of what leaves a ViT. A strategy that is the file of a setting
    has the budget that stands in it, and no other.

    Keeping everything is the unpruned model, so the ceiling is every strategy's 100 % point. One
    from which no token leaves, but which computes less, has a 100 % point of its own and no other.

    Raises:
        ConfigError: an unknown strategy, a bad budget, or none.
    """
    if not budgets and not reduces:
        raise ConfigError(f"No budget was given. Give some, such as {','.join(BUDGETS)}.")
    spelled = dict.fromkeys(spell(parse_keep(text)) for text in budgets)
    below = [text for text in spelled if text != "100%"]
    below += [f"{REDUCE}{number}" for number in dict.fromkeys(map(parse_reduce, reduces))]
    found = [CEILING, FLOOR] if blind else [CEILING]
    files = [name for name in strategies if is_setting(name)]
    found += [point_of(read_setting(file)) for file in files]
    names = [name for name in strategies if not is_setting(name)]
    for name in check_strategies(names) if names or not files else ():
        computes = build(name).kind == "compute"
        found += [Point(name, budget) for budget in (["100%"] if computes else below)]
    return found
