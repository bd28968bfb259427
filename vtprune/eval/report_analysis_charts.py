"""The charts of an analysis in a report, and its maps as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from vtprune.eval.analyze import Found
from vtprune.eval.analyze_maps import Map
from vtprune.eval.budgets import UNPRUNED
from vtprune.eval.report_charts import GRAY, SHADES, SYMBOLS, Chart, checked, plain_layout
from vtprune.eval.report_overlays import data_uri

# Name of a chart -> the quantity, its axis, whether equal ratios are equally far apart, its unit.
CHARTS: dict[str, tuple[str, str, bool, float]] = {
    "MDI": ("mdi", "MDI: attention per text token over that per visual token", True, 1),
    "AEI": ("aei_text", "AEI of text: its share of attention over its share of tokens", True, 1),
    "entropy": ("entropy", "entropy of attention, nats", False, 1),
    "sinks": ("to_text_sinks", "attention to sinks among text tokens, %", False, 100),
    "visual sinks": ("to_visual_sinks", "attention to sinks among visual tokens, %", False, 100),
    "tokens": ("visual", "visual tokens that rows can attend to", False, 1),
}
NEVER, ALWAYS = np.array([24, 26, 58]), np.array([255, 214, 74])  # colors of places


@dataclass(frozen=True)
class Picture:
    """A map as a picture of one pixel per place, and what it is of."""

    label: str
    what: str
    picture: str
    width: int
    height: int


def charts(founds: Sequence[Found]) -> dict[str, Chart]:
    """Returns a chart by name of what is known in every layer: a line per point."""
    return {name: by_layer(founds, *how) for name, how in CHARTS.items()}


def pictures(founds: Sequence[Found]) -> list[Picture]:
    """Returns which places survive how often, per point and grid."""
    return [drawn(found, of) for found in founds for of in found.maps]


def by_layer(founds: Sequence[Found], name: str, label: str, log: bool, unit: float) -> Chart:
    """Returns a quantity layer by layer, a line per point."""
    strategies = list(dict.fromkeys(f.strategy for f in founds if f.strategy != UNPRUNED))
    budgets = list(dict.fromkeys(f.budget for f in founds))
    data = []
    for found in founds:
        values = [getattr(layer, name) for layer in found.layers]
        whole = found.strategy == UNPRUNED
        color = GRAY if whole else SHADES[strategies.index(found.strategy) % len(SHADES)]
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": escape(UNPRUNED if whole else f"{found.strategy} {found.budget}"),
                "x": list(range(len(values))),
                "y": [None if value is None else unit * value for value in values],
                "line": {"color": color, "width": 1.8, "dash": "dash" if whole else "solid"},
                "marker": {
                    "size": 8,
                    "symbol": SYMBOLS[budgets.index(found.budget) % len(SYMBOLS)],
                },
            }
        )
    layout = plain_layout() | {
        "xaxis": {"title": {"text": "layer of the language model, from 0"}},
        "yaxis": {"title": {"text": label}, **({"type": "log"} if log else {})},
        "hovermode": "closest",
    }
    return checked(data, layout)


def drawn(found: Found, of: Map) -> Picture:
    """Returns a map as a picture; frames of a video stand side by side."""
    frames, rows, columns = of.grid
    share = np.array(of.share).reshape(of.grid).transpose(1, 0, 2).reshape(rows, -1)
    pixels = NEVER + share[..., None] * (ALWAYS - NEVER)
    size = f"{rows} x {columns}" if frames == 1 else f"{frames} x {rows} x {columns}"
    what = (
        f"{size}, {of.n} samples: a place survives in {100 * share.min():.0f} to "
        f"{100 * share.max():.0f} %, {100 * share.mean():.0f} on average"
    )
    uri = data_uri(pixels.round().astype(np.uint8))
    return Picture(f"{found.strategy} {found.budget}", what, uri, share.shape[1], rows)
