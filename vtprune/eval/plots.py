"""The curve of a sweep: accuracy against visual tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from vtprune.eval.budgets import BLIND, UNPRUNED
from vtprune.eval.stats import Summary

BASELINES = {"random": ":", "strided": "--"}
# Okabe and Ito's colors, told apart by color-blind readers too; yellow is too pale for a line.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"


def plot(summaries: Sequence[Summary], path: Path, title: str) -> None:
    """Writes the figure to ``path``: one line per strategy, 95 % intervals, ceiling and floor."""
    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.subplots()
    whole = [s for s in summaries if s.strategy == UNPRUNED]
    names = dict.fromkeys(s.strategy for s in summaries if s.strategy not in (UNPRUNED, BLIND))
    styles = _styles(list(names))
    for i, name in enumerate(names):
        line = [s for s in summaries if s.strategy == name] + whole
        _line(axes, name, sorted(line, key=lambda s: s.kept), styles[name], i - len(names) / 2)
    _level(axes, whole, "unpruned", "black")
    _level(axes, [s for s in summaries if s.strategy == BLIND], "blind (no image)", "firebrick")
    _axes(axes, title)
    figure.savefig(path)


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
    axes: Axes, name: str, points: Sequence[Summary], style: dict[str, object], shift: float
) -> None:
    """Draws one strategy; points move sideways a little so that intervals do not overlap."""
    x = [s.kept * 1.012**shift for s in points]
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


def _axes(axes: Axes, title: str) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(LogLocator(base=2, numticks=20))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_ylim(0, 102)
    axes.set_xlabel("visual tokens that enter a layer of the language model")
    axes.set_ylabel("right answers, % (bars: 95 % interval)")
    axes.set_title(title, parse_math=False)
    axes.grid(alpha=0.25)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
