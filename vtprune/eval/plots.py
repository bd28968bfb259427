"""The curves of a sweep: accuracy against visual tokens and the prefill's FLOPs.

Of a ViT it is what is right against the tower's GFLOPs, and against images per second.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import (
    FixedLocator,
    FuncFormatter,
    Locator,
    LogLocator,
    MaxNLocator,
    NullLocator,
)

from vtprune.eval.budgets import BLIND, UNPRUNED
from vtprune.eval.stats import Summary

BASELINES = {"random": ":", "strided": "--"}
# Okabe and Ito's colors, told apart by color-blind readers too; yellow is too pale for a line.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
LINE = 0.22  # inches of a name in the legend


@dataclass(frozen=True)
class Scale:
    """An axis: what it says, what of a point it shows, where its ticks are."""

    label: str
    value: Callable[[Summary], float]
    ticks: Locator


TOKENS = Scale(
    "visual tokens that enter a layer of the language model",
    lambda s: s.kept,
    LogLocator(base=2, numticks=20),
)
PREFILL = Scale(
    "FLOPs of the language model's prefill, % of unpruned",
    lambda s: 100 * (s.flops or 0),
    FixedLocator([1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100]),
)

CACHE = Scale(
    "keys and values after the prefill, % of unpruned",
    lambda s: 100 * (s.cache or 0),
    PREFILL.ticks,
)


def plot(summaries: Sequence[Summary], path: Path, title: str, gflops: float | None = None) -> None:
    """Writes the figure to ``path``: one line per strategy, 95 % intervals, ceiling and floor.

    Accuracy against tokens, and, where they are known, against FLOPs beside it, and against what
    caches hold where that is less though all tokens enter; of a ViT, whose tower takes ``gflops``
    unpruned, against these and images per second.
    """
    scales = _scales(summaries, gflops)
    height = max(5.0, 1 + LINE * len({s.strategy for s in summaries}))
    figure = Figure(figsize=(3 + 5 * len(scales), height), dpi=150, layout="constrained")
    every = figure.subplots(1, len(scales), sharey=True, squeeze=False)[0]
    for axes, scale in zip(every, scales, strict=True):
        _panel(axes, summaries, scale)
    every[0].set_ylim(0, 102)
    every[0].set_ylabel("right answers, % (bars: 95 % interval)")
    every[-1].legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    figure.suptitle(title, parse_math=False)
    figure.savefig(path)


def _scales(summaries: Sequence[Summary], gflops: float | None) -> list[Scale]:
    counted = all(s.flops is not None for s in summaries)
    if gflops is None:
        return [TOKENS, *([PREFILL] if counted else []), *([CACHE] if _shortens(summaries) else [])]
    ticks = MaxNLocator(6)
    work = Scale("GFLOPs of the blocks per image", lambda s: gflops * (s.flops or 0), ticks)
    pace = Scale("images per s", lambda s: 1000 / (s.ms or 1), ticks)
    return [work, pace] if all(s.ms for s in summaries) else [work]


def _shortens(summaries: Sequence[Summary]) -> bool:
    """Whether a cache holds less than all tokens that enter, and it is known of all points."""
    whole = max((s.kept for s in summaries), default=0.0)
    known = all(s.cache is not None for s in summaries)
    return known and any(s.kept >= whole and (s.cache or 1.0) < 1 for s in summaries)


def _panel(axes: Axes, summaries: Sequence[Summary], scale: Scale) -> None:
    whole = [s for s in summaries if s.strategy == UNPRUNED]
    names = dict.fromkeys(s.strategy for s in summaries if s.strategy not in (UNPRUNED, BLIND))
    styles = _styles(list(names))
    for i, name in enumerate(names):
        line = sorted([s for s in summaries if s.strategy == name] + whole, key=scale.value)
        x = [scale.value(s) * 1.012 ** (i - len(names) / 2) for s in line]
        _line(axes, name, x, line, styles[name])
    _level(axes, whole, "unpruned", "black")
    _level(axes, [s for s in summaries if s.strategy == BLIND], "blind (no image)", "firebrick")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(scale.ticks)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axes.set_xlabel(scale.label)
    axes.grid(alpha=0.25)


def _styles(names: Sequence[str]) -> dict[str, dict[str, object]]:
    methods = [name for name in names if name not in BASELINES]
    styles: dict[str, dict[str, object]] = {
        name: {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)]}
        for i, name in enumerate(methods)
    }
    for name, dashes in BASELINES.items():
        styles[name] = {"color": "0.5", "marker": ".", "linestyle": dashes, "zorder": 1}
    return styles


def _line(
    axes: Axes,
    name: str,
    x: Sequence[float],
    points: Sequence[Summary],
    style: dict[str, object],
) -> None:
    """Draws one strategy; its points were moved sideways a little so that bars do not overlap."""
    y = [100 * s.accuracy.value for s in points]
    below = [100 * (s.accuracy.value - s.accuracy.low) for s in points]
    above = [100 * (s.accuracy.high - s.accuracy.value) for s in points]
    label = f"{name} (baseline)" if name in BASELINES else name
    axes.errorbar(x, y, (below, above), label=label, elinewidth=0.8, capsize=2, **style)  # type: ignore[arg-type]


def _level(axes: Axes, summaries: Sequence[Summary], name: str, color: str) -> None:
    for summary in summaries:
        value = 100 * summary.accuracy.value
        axes.axhline(value, color=color, linewidth=1, label=f"{name}: {value:.0f} %")
        low, high = 100 * summary.accuracy.low, 100 * summary.accuracy.high
        axes.axhspan(low, high, color=color, alpha=0.07, linewidth=0)
