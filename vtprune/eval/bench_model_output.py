"""What a benchmark of a model prints and writes: tables, ``bench.json`` and ``bench.md``."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import transformers
from rich import box
from rich.table import Table
from rich.text import Text

import vtprune
from vtprune.eval.bench_model_rows import PHASES, Row, Spread
from vtprune.eval.bench_results import commit, name_of
from vtprune.eval.results import write_whole

TIMES = {
    "strategy": "none = unpruned",
    "budget": "what --keep asks for",
    "kept": "visual tokens of a row that enter a layer of the language model, on average",
    "encoder": "vision tower and projector, without what a strategy does there",
    "scoring": "reading signals, scoring and selecting, wherever the strategy does so",
    "compact": "shortening prompt and features",
    "prefill": "from there to the first token; these four are the time to the first token",
    "decode": "a token after the first one",
    "end to\nend": "the whole call, in which phases are not timed",
    "peak\nMiB": "allocated on the GPU at most, weights too; not measured on CPUs",
}
RATIOS = {
    "strategy": "",
    "budget": "",
    "vs\nnone": "end to end, times unpruned",
    "vs\nrandom": "end to end, times random at the same budget",
    "vs\nfree": "scoring, compaction and prefill, times the prefill of a prompt that has so few "
    "visual tokens already (of strategies inside the language model: as many as enter a layer on "
    "average), their embeddings given",
    "scoring,\n%": "of the unpruned prefill",
    "break-\neven": "visual tokens of a row that must leave until the prefill is shorter by what "
    "scoring and compaction take, by a + b n + c n^2 fitted to the prefills of several lengths; "
    "empty where that never is",
    "prefill,\n20 - 80 %": "quantiles, ms",
    "end to end,\n20 - 80 %": "quantiles, ms",
}
HOW = (
    "Times are medians in ms over interleaved rounds, ratios medians of those within a round; the "
    "device is waited for before the clock is read."
)


def legend() -> list[str]:
    """Returns what the columns mean, a line each."""
    columns = {**TIMES, **{name: what for name, what in RATIOS.items() if what}}
    return [HOW, *(f"{_plain(name)}: {what}." for name, what in columns.items())]


def times(row: Row) -> list[str]:
    """Returns the cells of a row, in the order of ``TIMES``."""
    medians = [_ms(row.phases[name].median) for name in PHASES]
    return [row.strategy, row.budget, f"{row.kept:.4g}", *medians, _number(row.peak_mib, ".0f")]


def ratios(row: Row) -> list[str]:
    """Returns the cells of a row, in the order of ``RATIOS``; empty where they mean nothing."""
    share = None if row.scoring_share is None else 100 * row.scoring_share
    return [
        row.strategy,
        row.budget,
        *(_number(x, ".3f") for x in (row.over_unpruned, row.over_random, row.over_free)),
        _number(share, ".2f"),
        _number(row.break_even, "d"),
        *(_range(row.phases[name]) for name in ("prefill", "end_to_end")),
    ]


def tables(rows: Sequence[Row]) -> list[Table]:
    """Returns two tables for the terminal per batch size and resolution, 80 columns wide."""
    found = []
    for title, group in _groups(rows):
        for columns, cells in ((TIMES, times), (RATIOS, ratios)):
            table = Table(title=Text(title), box=box.SIMPLE, padding=0)
            for i, name in enumerate(columns):  # a long name is folded, figures never are
                side = "left" if i == 0 else "right"
                table.add_column(name, justify=side, no_wrap=i > 0, overflow="fold")
            for row in group:
                table.add_row(*(Text(cell) for cell in cells(row)))
            found.append(table)
    return found


def markdown(rows: Sequence[Row], settings: Mapping[str, Any]) -> str:
    """Returns conditions and tables in Markdown."""
    parts = [conditions(settings), *settings["left_out"]]
    for title, group in _groups(rows):
        parts.append(f"### {title}")
        for columns, cells in ((TIMES, times), (RATIOS, ratios)):
            lines = ["| " + " | ".join(map(_plain, columns)) + " |"]
            lines += ["|---|" + "---:|" * (len(columns) - 1)]
            lines += ["| " + " | ".join(cells(row)) + " |" for row in group]
            parts.append("\n".join(lines))
    return "\n\n".join([*parts, "\n".join(f"- {line}" for line in legend())]) + "\n"


def settings_of(model: Any, name: str, command: str, **others: Any) -> dict[str, Any]:
    """Returns what a figure means nothing without."""
    packages = {"vtprune": vtprune.__version__, "torch": torch.__version__}
    packages |= {"transformers": transformers.__version__, "python": platform.python_version()}
    with suppress(PackageNotFoundError):
        packages["triton"] = version("triton")
    return {
        "model": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "device": name_of(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": model.config._attn_implementation,
        "versions": packages,
        "commit": commit(),
        "command": command,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        **others,
    }


def conditions(settings: Mapping[str, Any]) -> str:
    """Returns the settings in sentences."""
    versions = ", ".join(f"{name} {number}" for name, number in settings["versions"].items())
    weights = " with random weights" if settings["random_weights"] else ""
    return (
        f"`{settings['command']}`: {settings['model']}{weights}, "
        f"{settings['parameters'] / 1e6:.4g} M parameters, {settings['dtype']}, "
        f"{settings['attention']}, {settings['device']}; one picture and {settings['words']} other "
        f"tokens per row, {settings['decode_tokens']} tokens after the first; "
        f"{settings['rounds']} rounds after one of warm-up; {versions}, commit "
        f"{settings['commit'] or 'unknown'}."
    )


def write(folder: Path, rows: Sequence[Row], settings: Mapping[str, Any]) -> None:
    """Writes ``bench.json`` and ``bench.md``."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = {"settings": settings, "rows": [asdict(row) for row in rows]}
    write_whole(folder / "bench.json", json.dumps(whole, indent=2) + "\n")
    write_whole(folder / "bench.md", markdown(rows, settings))


def _groups(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """Returns the rows of each batch size and resolution, with a title."""
    found = []
    for (batch, resolution), some in groupby(rows, lambda row: (row.batch, row.resolution)):
        group = list(some)
        tokens = f"{group[0].visual_tokens} visual tokens per row"
        found.append((f"batch {batch}, {resolution} pixels, {tokens}", group))
    return found


def _plain(name: str) -> str:
    """Returns the name of a column in one line."""
    return name.replace("-\n", "-").replace("\n", " ")


def _ms(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def _range(spread: Spread) -> str:
    return f"{_ms(spread.p20)} - {_ms(spread.p80)}"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
