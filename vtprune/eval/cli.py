"""The command line: ``vtprune sweep``, ``show`` and ``list``."""

from __future__ import annotations

import inspect
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers.utils import logging
from typer.core import TyperGroup

from vtprune.errors import ConfigError, VTPruneError
from vtprune.eval import shipped
from vtprune.eval import show as showing
from vtprune.eval.budgets import BUDGETS, STRATEGIES, parse_keep, points, split
from vtprune.eval.plots import plot
from vtprune.eval.results import Folder, check_folder, write_whole
from vtprune.eval.stats import Summary, summarize
from vtprune.eval.sweep import Sweep, settings_of
from vtprune.eval.tables import markdown, rich_table
from vtprune.registry import strategy_class, strategy_names


class _Commands(TyperGroup):
    """Shows this package's errors as one line; other errors keep their traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except VTPruneError as error:
            message = f"[red]{escape(str(error))}[/red]"
            Console(stderr=True, soft_wrap=True, highlight=False).print(message)
            raise typer.Exit(2) from error


app = typer.Typer(
    cls=_Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)
Model = Annotated[str, typer.Option(help="Shipped model, directory of a saved one, or hub id.")]


@app.callback()
def vtprune() -> None:
    """Drop or merge the visual tokens that a vision-language model can do without."""
    logging.disable_progress_bar()


@app.command()
def sweep(
    model: Model = shipped.DEFAULT,
    strategy: Annotated[str, typer.Option(help="Names with commas, or 'all'.")] = ",".join(
        STRATEGIES
    ),
    keep: Annotated[
        str, typer.Option(help="Budgets with commas: 64 is tokens; 0.25 or 25% is a share.")
    ] = ",".join(BUDGETS),
    limit: Annotated[int, typer.Option(min=1, help="Held-out samples.")] = 300,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples per batch.")] = 16,
    out: Annotated[Path, typer.Option(help="Folder for the results; resumed.")] = Path("sweep"),
    seed: Annotated[int, typer.Option(min=0, help="Of strategies that draw at random.")] = 0,
) -> None:
    """Accuracy against token budget on held-out samples: table, plot and files."""
    console = Console()
    chosen = points(split(strategy), split(keep))
    check_folder(out)
    loaded, processor = shipped.load(model)
    settings = settings_of(loaded, model, limit=limit, batch_size=batch_size, seed=seed)
    run = Sweep(loaded, processor, chosen, settings)
    folder = Folder(out, settings)
    for note in folder.damage:
        console.print(f"[yellow]{escape(note)}[/yellow]", soft_wrap=True)
    total = limit * len(chosen)
    try:
        with _progress(console) as progress:
            task = progress.add_task("answers", total=total)
            run.run(folder, lambda n: progress.advance(task, n))
    except KeyboardInterrupt:
        done = f"{len(folder.answers.rows)} of {total} answers are in {out}"
        console.print(f"Interrupted; {escape(done)}. The same command resumes.", soft_wrap=True)
        raise typer.Exit(130) from None
    title = f"{model}, {limit} held-out scenes"
    _finish(folder, summarize(chosen, folder.answers.rows, folder.timings.rows), title, console)


@app.command()
def show(
    image: Annotated[Path, typer.Argument(help="Image file.")],
    question: Annotated[str, typer.Option(help="What to ask.")] = showing.QUESTION,
    strategy: Annotated[str, typer.Option(help="One strategy.")] = showing.STRATEGY,
    keep: Annotated[str, typer.Option(help="64 is tokens; 0.25 or 25% is a share.")] = "25%",
    out: Annotated[Path, typer.Option(help="Picture to write.")] = Path("kept.png"),
    model: Model = shipped.DEFAULT,
) -> None:
    """Answer a question about one image, and draw the patches that were kept."""
    strategy_class(strategy)
    shown = showing.show(image, question, strategy, parse_keep(keep), out, model)
    console = Console(highlight=False, soft_wrap=True)
    console.print(
        f"{escape(shown.question)} [bold]{escape(shown.answer or showing.NOTHING)}[/bold] "
        f"({strategy}, {shown.kept} of {shown.tokens} visual tokens; "
        f"unpruned: {escape(shown.unpruned or showing.NOTHING)})"
    )
    console.print(f"Picture: {escape(str(out))}")


@app.command("list")
def list_() -> None:
    """Strategies, and what they do."""
    names = strategy_names()
    width = max(map(len, names))
    for name in names:
        module = sys.modules[strategy_class(name).__module__]
        what = (inspect.getdoc(module) or "").partition("\n")[0]
        typer.echo(f"{name:<{width}}  {what}")


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def _finish(folder: Folder, summaries: list[Summary], title: str, console: Console) -> None:
    """Writes ``summary.json``, ``table.md`` and ``accuracy.png``, and prints the table."""
    if not summaries:
        raise ConfigError("Nothing was measured.")
    rows = json.dumps([asdict(summary) for summary in summaries], indent=2)
    write_whole(folder.path / "summary.json", rows + "\n")
    write_whole(folder.path / "table.md", markdown(summaries, title))
    plot(summaries, folder.path / "accuracy.png", title)
    console.print(rich_table(summaries, title))
    console.print(f"Files: {escape(str(folder.path))}", soft_wrap=True)
