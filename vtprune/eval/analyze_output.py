"""What an analysis prints and writes: tables, ``analysis.json`` and ``analysis.md``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from vtprune.eval.analyze import Found
from vtprune.eval.analyze_stats import STAGES, Figures, stages_of
from vtprune.eval.report_overlays import Gallery
from vtprune.eval.results import write_whole

FILE = "analysis.json"
# Column of the tables by layer -> the quantity, and how it is written.
COLUMNS: dict[str, tuple[str, str]] = {
    "text": ("text", ".4g"),
    "visual": ("visual", ".4g"),
    "MDI": ("mdi", ".2f"),
    "MDI, of means": ("mdi_of_means", ".2f"),
    "AEI text": ("aei_text", ".2f"),
    "AEI visual": ("aei_visual", ".2f"),
    "entropy": ("entropy", ".2f"),
    "sinks, text": ("text_sinks", ".3g"),
    "sinks, visual": ("visual_sinks", ".3g"),
    "to text sinks, %": ("to_text_sinks", "%"),
    "to visual sinks, %": ("to_visual_sinks", "%"),
    "to the first, %": ("to_first", "%"),
}
# The tables by stage: title -> columns of these.
STAGED = {
    "Text and image": (
        *("text", "visual", "MDI", "MDI, of means", "AEI text", "AEI visual", "entropy"),
    ),
    "Sinks": (
        *("sinks, text", "sinks, visual"),
        *("to text sinks, %", "to visual sinks, %", "to the first, %"),
    ),
}
POINT = ("strategy", "budget")
PLACES = ("kind", "where", "a sink, %", "draws, %")
LEGEND = (
    "Rows are the queries of generated tokens (of the last token of the prompt where an answer has "
    "none), heads averaged; figures are means over samples, and over the first two layers (early), "
    "the two in the middle and the last two (late).",
    "MDI: attention per text token over that per visual token, of the tokens that are there in a "
    "layer; above 1 text dominates. The mean of the samples' ratios, and the ratio of the two "
    "means. AEI: share of the attention to the prompt over share of its tokens.",
    "entropy: of the rows, in nats, mean over heads.",
    "sinks: tokens that enter a layer with one of the sink dimensions above tau root mean squares. "
    "to ...: share of the rows' attention that they draw; the first is the prompt's first token.",
)


def text(value: float | None, form: str) -> str:
    """Returns a figure in a table; empty where there is none."""
    if value is None:
        return ""
    return f"{100 * value:.1f}" if form == "%" else format(value, form)


def cells(figures: Figures, columns: Sequence[str] = tuple(COLUMNS)) -> list[str]:
    """Returns the cells of a layer or of a stage."""
    chosen = (COLUMNS[column] for column in columns)
    return [text(getattr(figures, name), form) for name, form in chosen]


def staged(found: Found, columns: Sequence[str]) -> list[list[str]]:
    """Returns the rows of a point, one per stage."""
    named = zip(STAGES, stages_of(found.layers), strict=True)
    return [[*found.point_cells, stage, *cells(of, columns)] for stage, of in named]


def places(found: Found) -> list[list[str]]:
    """Returns a row per place where sinks are, in the order of ``POINT`` and ``PLACES``."""
    return [
        [*found.point_cells, p.kind, p.where, text(p.sink, "%"), text(p.attention, "%")]
        for p in found.places
    ]


def parts(founds: Sequence[Found]) -> dict[str, tuple[list[str], list[list[list[str]]]]]:
    """Returns the tables by title: names of columns, and per point its rows."""
    made = {
        title: ([*POINT, "layers", *columns], [staged(found, columns) for found in founds])
        for title, columns in STAGED.items()
    }
    listed = [rows for found in founds if (rows := places(found))]
    return made | ({"Where sinks are": ([*POINT, *PLACES], listed)} if listed else {})


def tables(founds: Sequence[Found]) -> list[Table]:
    """Returns the tables for the terminal, 80 columns wide: dominance, sinks, their places."""
    made = []
    for title, (names, points) in parts(founds).items():
        table = Table(title=Text(title), box=box.SIMPLE, padding=0)
        for i, name in enumerate(names):  # names are folded, figures never are
            side, plain = "left" if i < 3 else "right", title not in STAGED
            head = name if plain else name.replace(" ", "\n")
            table.add_column(head, justify=side, no_wrap=i > 0, overflow="fold")
        for rows in points:
            for i, row in enumerate(rows):
                table.add_row(*map(Text, row), end_section=i == len(rows) - 1)
        made.append(table)
    return made


def conditions(settings: Mapping[str, Any]) -> str:
    """Returns the settings in sentences."""
    versions = ", ".join(f"{name} {number}" for name, number in settings["versions"].items())
    dims = ", ".join(map(str, settings["sink_dims"])) or "none"
    how = "" if settings["sink_dims_given"] else ", found by themselves"
    first = " The first token counts as no text." if settings["exclude_bos"] else ""
    return (
        f"`{settings['command']}`: {settings['model']}, {settings['samples']} samples of "
        f"{settings['task']}, batch {settings['batch_size']}, {settings['dtype']}, "
        f"{settings['attention']}, {settings['device']}. Sink dimensions: {dims}{how}; tau "
        f"{settings['tau']:.4g}.{first} {versions}, commit {settings['commit'] or 'unknown'}."
    )


def markdown(founds: Sequence[Found], settings: Mapping[str, Any]) -> str:
    """Returns conditions and tables in Markdown, by stage and by layer."""
    made = [conditions(settings)]
    for title, (names, points) in parts(founds).items():
        made += [f"### {title}", _markdown(names, [row for rows in points for row in rows])]
    for found in founds:
        right = f"{100 * found.right:.1f} % of {found.n} right"
        last = f"; of {found.read_last} the last token of the prompt" if found.read_last else ""
        made.append(f"### {found.strategy} {found.budget}\n\n{right}{last}")
        rows = [[str(i), *cells(layer)] for i, layer in enumerate(found.layers)]
        made.append(_markdown(["layer", *COLUMNS], rows))
    return "\n\n".join([*made, "\n".join(f"- {line}" for line in LEGEND)]) + "\n"


def write(
    folder: Path, founds: Sequence[Found], settings: Mapping[str, Any], gallery: Gallery
) -> None:
    """Writes ``analysis.json`` and ``analysis.md``."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = {
        "settings": settings,
        "points": [asdict(found) for found in founds],
        "gallery": asdict(gallery),
    }
    write_whole(folder / FILE, json.dumps(whole, allow_nan=False) + "\n")
    write_whole(folder / "analysis.md", markdown(founds, settings))


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(columns) + " |"]
    lines.append("|---|" + "---:|" * (len(columns) - 1))
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines)
