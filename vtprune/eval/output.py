"""What a sweep leaves behind: tables, plots and a summary per task."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vtprune.eval.budgets import Point, split
from vtprune.eval.plots import plot
from vtprune.eval.results import Folder, write_whole
from vtprune.eval.stats import summarize
from vtprune.eval.tables import markdown, rich_table


def progress_bar(console: Console) -> Progress:
    """Returns the live bar: what is done, of how much, and the time left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def write_output(folder: Folder, points: Sequence[Point], console: Console) -> None:
    """Writes ``summary.json``, ``table.md`` and a plot per task, and prints the tables.

    Tasks without an answer yet are left out.
    """
    settings = folder.settings
    names = split(settings.task)
    rows, tables = [], []
    for name in names:
        summaries = summarize(
            points,
            [row for row in folder.answers.rows if row.task == name],
            [row for row in folder.timings.rows if row.task == name],
        )
        if not summaries:
            continue
        title = f"{settings.model}, {name}, {settings.limit} samples"
        rows += [{"task": name, **asdict(summary)} for summary in summaries]
        tables.append(markdown(summaries, title))
        picture = "accuracy.png" if len(names) == 1 else f"accuracy-{name}.png"
        plot(summaries, folder.path / picture, title)
        console.print(rich_table(summaries, title))
    write_whole(folder.path / "summary.json", json.dumps(rows, indent=2) + "\n")
    write_whole(folder.path / "table.md", "\n".join(tables))
    console.print(f"Files: {escape(str(folder.path))}", soft_wrap=True)
