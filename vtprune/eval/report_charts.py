"""The charts of a report, as what plotly draws in the browser.

All text is escaped: plotly takes some HTML in names and hovers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

from vtprune.eval._extras import need
from vtprune.eval.bench_model_rows import PARTS
from vtprune.eval.budgets import BLIND, UNPRUNED
from vtprune.eval.plots import BASELINES, COLORS
from vtprune.eval.report_bench import Timed
from vtprune.eval.report_tables import Axis, Task, front
from vtprune.eval.stats import Summary
from vtprune.eval.tables import points_text

# Seen on light and on dark ground; black is not.
SHADES = tuple(color for color in COLORS if color != "#000000")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "x", "star")
DASHES = {":": "dot", "--": "dash"}
GRAY, GOLD = "#888888", "#E6B800"
MANY = 8  # with more strategies intervals are shown in hovers alone

Chart = dict[str, Any]


def library() -> str:
    """Returns plotly's JavaScript.

    Raises:
        ImportError: plotly is not installed.
    """
    return need("plotly.offline", extra="eval").get_plotlyjs()


def accuracy(task: Task, axis: Axis) -> Chart:
    """Returns right answers against what a point costs: a line per strategy, and the front."""
    summaries = [s for s in task.summaries if (axis.value(s) or 0) > 0]
    whole = [s for s in summaries if s.strategy == UNPRUNED]
    names = [s.strategy for s in summaries if s.strategy not in (UNPRUNED, BLIND)]
    strategies = [n for n in dict.fromkeys(names) if n not in BASELINES]
    bars = len(strategies) <= MANY
    data = [_front(front(summaries, axis), axis)]
    every = list(dict.fromkeys(names))
    for i, name in enumerate(every):
        mine = sorted([s for s in summaries if s.strategy == name], key=lambda s: s.kept)
        number = strategies.index(name) if name in strategies else -1
        line = _line(name, [*mine, *whole], axis, number)
        line["error_y"]["visible"] = bars
        if bars and axis.log:  # a little sideways, so that bars do not hide each other
            beside = 1.012 ** (i - (len(every) - 1) / 2)
            line["x"][: len(mine)] = [x * beside for x in line["x"][: len(mine)]]
        data.append(line)
    layout = plain_layout() | {
        "height": min(max(520, 60 + 19 * len(data)), 760),  # as the legend needs
        "xaxis": {"title": {"text": axis.label}, **_ticks(summaries, axis)},
        "yaxis": {"title": {"text": "right answers, %"}},
        "hovermode": "closest",
        "shapes": [],
        "annotations": [],
    }
    for one in task.summaries:
        if one.strategy in (UNPRUNED, BLIND):
            _level(layout, one)
    return checked(data, layout)


def phases(rows: Sequence[Timed]) -> Chart:
    """Returns a bar per setting, its phases up to the first token one after the other."""
    labels = [escape(row.label) for row in rows]
    data = []
    for i, name in enumerate(PARTS):
        spreads = [row.row.phases[name] for row in rows]
        hovers = [
            f"<b>{label}</b><br>{name}: {s.median:.4g} ms [{s.p20:.4g}, {s.p80:.4g}]"
            for label, s in zip(labels, spreads, strict=True)
        ]
        data.append(
            {
                "type": "bar",
                "orientation": "h",
                "name": name,
                "y": labels,
                "x": [s.median for s in spreads],
                "hovertext": hovers,
                "hoverinfo": "text",
                "marker": {"color": SHADES[i]},
            }
        )
    layout = plain_layout() | {
        "barmode": "stack",
        "legend": {"traceorder": "normal"},
        "height": 140 + 28 * len(rows),
        "xaxis": {"title": {"text": "milliseconds to the first token, medians"}},
        "yaxis": {"autorange": "reversed", "automargin": True, "type": "category"},
    }
    return checked(data, layout)


def _front(members: Sequence[Summary], axis: Axis) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": "Pareto front",
        "x": [axis.value(s) for s in members],
        "y": [100 * s.accuracy.value for s in members],
        "line": {"color": GOLD, "width": 9, "shape": "hv"},
        "marker": {"size": 19, "color": GOLD},
        "opacity": 0.4,
        "hoverinfo": "skip",
    }


def _line(name: str, points: Sequence[Summary], axis: Axis, number: int) -> dict[str, Any]:
    """Returns the line of a strategy; ``number`` is below 0 for a baseline."""
    color = GRAY if number < 0 else SHADES[number % len(SHADES)]
    shares = [s.accuracy for s in points]
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": escape(f"{name} (baseline)" if number < 0 else name),
        "x": [axis.value(s) for s in points],
        "y": [100 * share.value for share in shares],
        "error_y": {
            "type": "data",
            "symmetric": False,
            "array": [100 * (share.high - share.value) for share in shares],
            "arrayminus": [100 * (share.value - share.low) for share in shares],
            "thickness": 1,
            "width": 3,
        },
        "hovertext": [_hover(s) for s in points],
        "hoverinfo": "text",
        "line": {
            "color": color,
            "width": 1.8,
            "dash": DASHES.get(BASELINES.get(name, ""), "solid"),
        },
        "marker": {"size": 8, "symbol": SYMBOLS[number % len(SYMBOLS)]},
    }


def _hover(s: Summary) -> str:
    lines = [f"<b>{escape(s.strategy)} {escape(s.budget)}</b>"]
    lines.append(f"right: {points_text(s.accuracy, '')} %")
    if s.difference is not None:
        lines.append(f"vs unpruned: {points_text(s.difference, '+')} points")
    lines.append(f"tokens: {s.kept:.4g}")
    if s.flops is not None:
        lines.append(f"FLOPs: {100 * s.flops:.1f} %")
    if s.cache is not None:
        lines.append(f"KV cache: {100 * s.cache:.1f} %")
    if s.ms is not None:
        lines.append(f"time: {s.ms:.1f} ms per sample")
    return "<br>".join([*lines, f"n: {s.n}"])


def _level(layout: dict[str, Any], one: Summary) -> None:
    """Adds a line across the chart, with its name."""
    y, name = 100 * one.accuracy.value, "no image" if one.strategy == BLIND else UNPRUNED
    line = {"color": GRAY, "width": 1, "dash": "dashdot"}
    across = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": y, "y1": y}
    text = f"{name} {y:.1f} %"
    place = {"xref": "paper", "x": 0, "y": y, "xanchor": "left", "yanchor": "bottom"}
    layout["shapes"].append({**across, "line": line, "layer": "below"})
    layout["annotations"].append({**place, "text": text, "showarrow": False})


def _ticks(summaries: Sequence[Summary], axis: Axis) -> dict[str, Any]:
    """Returns a scale; one in which ratios count has ticks at powers of two."""
    if not axis.log:
        return {"rangemode": "tozero"}
    values = [axis.value(s) or 1 for s in summaries] or [1]
    low, high = math.floor(math.log2(min(values))), math.ceil(math.log2(max(values)))
    ticks = [2.0**i for i in range(low, high + 1)]
    return {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:.3g}" for tick in ticks]}


def plain_layout() -> dict[str, Any]:
    """Returns what charts share; colors of text and grid are set in the browser, by its scheme."""
    return {
        "height": 520,
        "margin": {"l": 55, "r": 15, "t": 32, "b": 50},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "hoverlabel": {"align": "left"},
        "showlegend": True,
    }


def checked(data: Sequence[dict[str, Any]], layout: dict[str, Any]) -> Chart:
    """Returns the chart; a property that plotly does not know is refused here, not in a browser."""
    graphs = need("plotly.graph_objects", extra="eval")
    return graphs.Figure(data, layout | {"template": {}}).to_plotly_json()
