"""What a sweep leaves behind: tables, plots and a summary per task."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vtprune.eval.budgets import Point, split
from vtprune.eval.lmms_metrics import write_metrics
from vtprune.eval.plots import plot
from vtprune.eval.results import Folder, write_whole
from vtprune.eval.stats import Summary, summarize
from vtprune.eval.tables import markdown, rich_table


def progress_bar(console: Console) -> Progress:
    """Returns the live bar: what is done, of how much, and the time left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=console.quiet,
    )


def summaries_of(folder: Folder, first: Sequence[Point]) -> dict[str, list[Summary]]:
    """Returns the summaries by task: the points ``first``, then others that the folder holds."""
    points = list(dict.fromkeys([*first, *(row.point for row in folder.answers.rows)]))
    found = {}
    for task in split(folder.settings.task):
        answers = [row for row in folder.answers.rows if row.task == task]
        timings = [row for row in folder.timings.rows if row.task == task]
        if answers:
            found[task] = summarize(points, answers, timings)
    return found


def write_output(
    folder: Folder, points: Sequence[Point], console: Console, gflops: float | None = None
) -> None:
    """Writes ``summary.json``, ``table.md`` and a plot per task, and prints the tables.

    Args:
        gflops: of the unpruned tower, where a ViT was measured.
    """
    found = summaries_of(folder, points)
    rows = [{"task": task, **asdict(one)} for task, several in found.items() for one in several]
    titles = {task: f"{folder.settings.model}, {task}" for task in found}
    tables = [markdown(several, titles[task], gflops) for task, several in found.items()]
    write_whole(folder.path / "summary.json", json.dumps(rows, indent=2) + "\n")
    write_whole(folder.path / "table.md", "\n".join(tables))
    for task, several in found.items():
        one_task = len(split(folder.settings.task)) == 1
        picture = "accuracy.png" if one_task else f"accuracy-{task.replace(':', '-')}.png"
        plot(several, folder.path / picture, titles[task], gflops)
        console.print(rich_table(several, titles[task], gflops))
    write_metrics(folder.path, points, console)
    console.print(f"Files: {escape(str(folder.path))}", soft_wrap=True)
