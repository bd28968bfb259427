"""The command line: ``vtprune sweep``, ``compare``, ``show``, ``list`` and others."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.text import Text
from transformers.utils import logging
from typer.core import TyperGroup

from vtprune import __version__
from vtprune.errors import ConfigError, VTPruneError
from vtprune.eval import calibrate as calibrating
from vtprune.eval import compare as comparing
from vtprune.eval import doctor as checking
from vtprune.eval import samples, shipped
from vtprune.eval import scenes as making
from vtprune.eval import show as showing
from vtprune.eval.asked import asked, asked_one
from vtprune.eval.budgets import BUDGETS, STRATEGIES, Point, parse_budget, split
from vtprune.eval.cli_analyze import analyze
from vtprune.eval.cli_bench import bench
from vtprune.eval.cli_report import report
from vtprune.eval.cli_train import Device, Dtype, Model, train
from vtprune.eval.cli_tune import tune_command
from vtprune.eval.cli_words import command, given_of
from vtprune.eval.export import write_parquet
from vtprune.eval.output import progress_bar, write_output
from vtprune.eval.ranks import Ranks
from vtprune.eval.results import Folder, check_folder, write_whole
from vtprune.eval.samples_vit import VIT_TASKS
from vtprune.eval.sweep import settings_of
from vtprune.registry import build, family_notes, strategy_class, strategy_names


class _Commands(TyperGroup):
    """Shows this package's errors as one line; other errors keep their traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (VTPruneError, ImportError) as error:
            if isinstance(error, ImportError) and "vtprune[" not in str(error):
                raise
            message = f"[red]{escape(str(error))}[/red]"
            console = Console(stderr=True, soft_wrap=True, highlight=False)
            (ctx.obj or Ranks.alone()).once(lambda: console.print(message))
            raise typer.Exit(2) from error


app = typer.Typer(
    cls=_Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def vtprune(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    """Drop or merge the visual tokens that a vision-language model can do without."""
    logging.disable_progress_bar()
    ctx.obj = Ranks.join()
    if ctx.obj.world > 1 and ctx.invoked_subcommand != "sweep":
        raise ConfigError(
            f"vtprune {ctx.invoked_subcommand} runs in one process; only sweep is shared by "
            "several. Start it without torchrun or accelerate launch."
        )


@app.command()
def sweep(
    ctx: typer.Context,
    model: Model = shipped.DEFAULT,
    strategy: Annotated[
        str, typer.Option(help="Names with commas, options as in 'zipvl(tau=0.96)'; or 'all'.")
    ] = ",".join(STRATEGIES),
    keep: Annotated[
        str, typer.Option(help="Budgets with commas: 64 is tokens; 0.25 or 25% is a share.")
    ] = ",".join(BUDGETS),
    reduce: Annotated[
        str, typer.Option(help="Of ViTs, with commas: 8 leave per block; 0.5 of the FLOPs saved.")
    ] = "",
    task: Annotated[
        str,
        typer.Option(help="Names with commas; see list. By model. lmms:pope asks by lmms-eval."),
    ] = "",
    include_path: Annotated[
        str, typer.Option(help="Folders with tasks in lmms-eval's form, with commas.")
    ] = "",
    limit: Annotated[int, typer.Option(min=1, help="Samples per task.")] = 300,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples per batch.")] = 16,
    out: Annotated[Path, typer.Option(help="Folder for the results; resumed.")] = Path("sweep"),
    seed: Annotated[
        int, typer.Option(min=0, max=10**9, help="Of strategies that draw at random.")
    ] = 0,
    hint: Annotated[
        str, typer.Option(help="Text after every question, such as 'Answer with one word.'")
    ] = "",
    device: Device = "cpu",
    dtype: Dtype = "float32",
) -> None:
    """Accuracy against token budget on held-out samples: table, plot and files."""
    ranks: Ranks = ctx.obj
    console = Console(quiet=not ranks.first)
    names = ("strategy", "keep", "reduce", "task", "include_path", "hint")
    vit = shipped.vit(model)
    wanted = asked(vit, {name: str(ctx.params[name]) for name in names}, given_of(ctx))
    ctx.params |= wanted.options
    chosen: Sequence[Point] = wanted.points
    check_folder(out)
    folder, stopped, gflops = None, None, None
    total = limit * len(chosen) * len(wanted.tasks)
    try:
        loaded, processor = shipped.load(model, ranks.device(device), dtype)
        settings = settings_of(
            loaded,
            processor,
            model.rstrip("/") or model,
            task=",".join(found.name for found in wanted.tasks),
            limit=limit,
            batch_size=batch_size,
            seed=seed,
            hint=hint,
        )
        everything = "all" in split(wanted.options["strategy"])
        run = wanted.sweep(loaded, processor, chosen, settings, lenient=everything)
        chosen, gflops, total = run.points, run.gflops, run.total
        folder = Folder(out, settings, ranks)
        folder.remember(command(ctx))
        for note in [*run.refused.values(), *folder.damage]:
            console.print(f"[yellow]{escape(note)}[/yellow]", soft_wrap=True)
        with progress_bar(console) as progress:
            bar = progress.add_task("answers", total=total)
            run.run(folder, lambda n: progress.update(bar, completed=ranks.count(n)))
    except KeyboardInterrupt:
        stopped = "Interrupted"
    except BaseException:
        if folder is not None:
            folder.close()
        raise
    if stopped:
        done = 0 if folder is None else count(folder, chosen)
        message = f"{stopped}; {done} of {total} answers are in {out}. This resumes:"
        console.print(Text(f"{message}\n{command(ctx)}"), soft_wrap=True)
    if folder is not None:
        if ranks.first:
            write_output(folder, chosen, console, gflops)
        folder.close()
    if stopped:
        raise typer.Exit(130)


@app.command()
def show(
    ctx: typer.Context,
    image: Annotated[Path | None, typer.Argument(help="Image file; without it a scene.")] = None,
    scene: Annotated[int, typer.Option(min=0, help="Number of a held-out scene, or picture.")] = 0,
    clip: Annotated[int | None, typer.Option(min=0, help="Number of a held-out clip.")] = None,
    question: Annotated[str | None, typer.Option(help="What to ask; mini-clip: a caption.")] = None,
    strategy: Annotated[
        str, typer.Option(help="One strategy, or the file of a setting.")
    ] = showing.STRATEGY,
    keep: Annotated[str, typer.Option(help="64 is tokens; 0.25 or 25% is a share.")] = "25%",
    out: Annotated[Path, typer.Option(help="Picture to write.")] = Path("kept.png"),
    model: Model = shipped.DEFAULT,
) -> None:
    """Answer a question about an image or clip, and draw the patches that were kept or merged."""
    point = asked_one(strategy, keep, given_of(ctx))
    strategy = point.strategy
    if build(strategy).kind in ("compute", "cache"):
        raise ConfigError(f"{strategy} keeps all visual tokens, so there is nothing to draw.")
    if "keep" not in (budget := parse_budget(point.budget)):
        raise ConfigError(f"{point.budget} says what leaves per block; show takes --keep.")
    picture, asked = showing.what_to_show(image, scene, question, shipped.vit(model), clip)
    shown = showing.show(picture, asked, strategy, budget["keep"], out, model)
    console = Console(highlight=False, soft_wrap=True)
    asked_first = f"{escape(shown.question)} " if shown.question else ""
    console.print(
        f"{asked_first}[bold]{escape(shown.answer or showing.NOTHING)}[/bold] "
        f"({strategy}, {shown.kept} of {shown.tokens} visual tokens; "
        f"unpruned: {escape(shown.unpruned or showing.NOTHING)})"
    )
    console.print(f"Picture: {escape(str(out))}")


@app.command()
def compare(
    folder: Annotated[Path, typer.Argument(help="What a sweep wrote: its --out.")],
    to: Annotated[str, typer.Option(help="The strategy that the others are compared with.")],
    kinds: Annotated[str, typer.Option(help="Of questions, with commas; all if left out.")] = "",
) -> None:
    """Paired differences between strategies on the samples of a sweep, by budget."""
    found = comparing.differences(comparing.read_answers(folder, split(kinds)), to)
    Console(highlight=False, soft_wrap=True).print(comparing.table(found, to))
    file = folder / f"against-{to}.md"
    write_whole(file, comparing.markdown(found, to))
    typer.echo(f"File: {file}")


@app.command()
def calibrate(
    strategy: Annotated[str, typer.Argument(help="shortv: the order of its layers.")],
    model: Model = shipped.DEFAULT,
    task: Annotated[str, typer.Option(help="One name; see list.")] = samples.DEFAULT,
    limit: Annotated[int, typer.Option(min=1, help="Samples.")] = 40,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples per batch.")] = 8,
    out: Annotated[Path, typer.Option(help="File to write, .json.")] = Path("shortv.json"),
    device: Device = "cpu",
    dtype: Dtype = "float32",
) -> None:
    """Measure which layers of a model do least to visual tokens, and write their order."""
    if strategy != "shortv":
        strategy_class(strategy)
        raise ConfigError(f"{strategy} has no layers to measure; only 'shortv' does.")
    console = Console(highlight=False, soft_wrap=True)
    with progress_bar(console) as progress:
        bar = progress.add_task("layers", total=None)
        found = calibrating.calibrate_shortv(
            model,
            out,
            task=task,
            limit=limit,
            batch_size=batch_size,
            device=device,
            dtype=dtype,
            advance=lambda n: progress.advance(bar, n),
        )
    console.print("layer  contribution, nats (the first is replaced first)")
    for layer, made in found:
        console.print(f"{layer:>5}  {made:.3g}")
    console.print(f"File: {escape(str(out))}; wrap(model, 'shortv', layers=...) takes the first.")


app.command()(analyze)
app.command()(train)
app.command()(report)
app.command("tune")(tune_command)
app.add_typer(bench, name="bench")


@app.command("list")
def list_() -> None:
    """Strategies, models and tasks, and what they are."""
    modules = {name: sys.modules[strategy_class(name).__module__] for name in strategy_names()}
    strategies = {
        name: (inspect.getdoc(module) or "").partition("\n")[0] for name, module in modules.items()
    }
    models = {name: shipped.describe(name) for name in shipped.names()}
    families = {name: f"{cls.takes}; {note}" for name, (cls, note) in family_notes().items()}
    tasks = {task.name: task.what for task in samples.TASKS.values()}
    tasks |= {t.name: f"{vit}: {t.what}" for vit in VIT_TASKS for t in VIT_TASKS[vit].values()}
    sections = {"strategies": strategies, "models": models | families, "tasks": tasks}
    width = max(len(name) for section in sections.values() for name in section)
    for title, section in sections.items():
        typer.echo(f"{title}:")
        for name, what in section.items():
            typer.echo(f"  {name:<{width}}  {what}")


@app.command()
def scenes(
    out: Annotated[Path, typer.Option(help="File to write, .parquet.")] = Path("scenes.parquet"),
    limit: Annotated[int, typer.Option(min=1, help="Number of scenes.")] = 1000,
    level: Annotated[str, typer.Option(help=f"One of {', '.join(making.LEVELS)}.")] = "standard",
    split: Annotated[str, typer.Option(help=f"One of {', '.join(making.SPLITS)}.")] = "test",
) -> None:
    """Write scenes, questions and answers as a parquet file for other tools."""
    write_parquet(out, limit, level=level, split=split)
    typer.echo(f"{limit} {level} scenes ({split}): {out}")


@app.command()
def doctor() -> None:
    """Versions, devices and backends, what is missing, and which extra brings it."""
    raise typer.Exit(int(checking.run()))


def count(folder: Folder, chosen: Sequence[Point]) -> int:
    """Returns how many answers of these points the folder holds."""
    return sum(row.point in chosen for row in folder.answers.rows)
