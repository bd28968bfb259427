"""``vtprune report``: sweeps, benchmarks and analyses as one HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from vtprune.errors import ConfigError
from vtprune.eval import report as reporting
from vtprune.eval.budgets import split
from vtprune.eval.output import progress_bar


def report(
    folders: Annotated[list[Path], typer.Argument(help="What sweep, bench or analyze wrote.")],
    out: Annotated[
        Path | None, typer.Option(help="File to write, .html; in the first folder by default.")
    ] = None,
    samples: Annotated[
        str,
        typer.Option(help="Numbers of those to draw, with commas; some that strategies differ on."),
    ] = "",
    overlays: Annotated[
        bool, typer.Option(help="Draw which patches were kept, for which the model runs again.")
    ] = True,
    model: Annotated[
        str, typer.Option(help="Where the model is, if not where the sweep had it.")
    ] = "",
) -> None:
    """Curves, tables with tests, phases and kept patches as one HTML file that needs no network."""
    if not overlays and (samples or model):
        given = "--samples" if samples else "--model"
        raise ConfigError(
            f"{given} says what is drawn, --no-overlays that nothing is. Leave one out."
        )
    file = out or folders[0] / "report.html"
    console = Console(soft_wrap=True, highlight=False)
    pictures = reporting.Pictures(overlays, numbers(samples), model)
    with progress_bar(console) as progress:
        bar = progress.add_task("samples drawn", visible=False)
        notes = reporting.write_report(
            folders,
            file,
            pictures,
            lambda done, of: progress.update(bar, completed=done, total=of, visible=True),
        )
    for note in notes:
        console.print(f"[yellow]{escape(note)}[/yellow]")
    console.print(f"Report: {escape(str(file))} ({file.stat().st_size / 1e6:.1f} MB)")


def numbers(text: str) -> tuple[int, ...]:
    """Returns the numbers of samples in a list with commas.

    Raises:
        ConfigError: something in it is no number.
    """
    for word in split(text):
        if not word.isdecimal():
            raise ConfigError(f"--samples {word!r} is no number of a sample. Give some like 3,17.")
    return tuple(map(int, split(text)))
