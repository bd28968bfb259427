"""``vtprune analyze``: what a language model looks at, with and without strategies."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from vtprune.errors import ConfigError, UnsupportedError
from vtprune.eval import analyze_output as showing
from vtprune.eval import shipped
from vtprune.eval.analyze import Analysis, Options
from vtprune.eval.analyze_sinks import AUTO
from vtprune.eval.asked import asked
from vtprune.eval.bench_model_output import settings_of as measured_on
from vtprune.eval.budgets import FLOOR, split
from vtprune.eval.cli_train import Device, Dtype, Model
from vtprune.eval.cli_words import given_of
from vtprune.eval.output import progress_bar
from vtprune.eval.results import check_folder
from vtprune.eval.samples import DEFAULT, LMMS, MAX_NEW_TOKENS
from vtprune.eval.sweep import settings_of

STRATEGIES, BUDGETS = "fastervlm,fastv", "25%"


def analyze(
    ctx: typer.Context,
    model: Model = shipped.DEFAULT,
    strategy: Annotated[
        str, typer.Option(help="Names with commas, options as in 'zipvl(tau=0.96)'; or 'all'.")
    ] = STRATEGIES,
    keep: Annotated[
        str, typer.Option(help="Budgets with commas: 64 is tokens; 0.25 or 25% is a share.")
    ] = BUDGETS,
    task: Annotated[str, typer.Option(help="One name; see list.")] = DEFAULT,
    samples: Annotated[int, typer.Option(min=1, help="Of the task.")] = 48,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples per batch.")] = 8,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of an answer, whose queries are read.")
    ] = MAX_NEW_TOKENS,
    sink_dims: Annotated[
        str,
        typer.Option(help=f"Hidden dimensions with commas; {AUTO!r} finds them, 'auto,7' too."),
    ] = AUTO,
    tau: Annotated[
        float | None,
        typer.Option(
            help="Root mean squares that a sink exceeds; by default 20, less in models narrower "
            "than 4096."
        ),
    ] = None,
    exclude_bos: Annotated[
        bool, typer.Option("--exclude-bos", help="The first token counts as no text in MDI, AEI.")
    ] = False,
    draw: Annotated[int, typer.Option(min=0, help="Samples to draw for the report.")] = 4,
    out: Annotated[Path, typer.Option(help="Folder for analysis.json and analysis.md.")] = Path(
        "analysis"
    ),
    seed: Annotated[
        int, typer.Option(min=0, max=10**9, help="Of strategies that draw at random.")
    ] = 0,
    hint: Annotated[
        str, typer.Option(help="Text after every question, such as 'Answer with one word.'")
    ] = "",
    device: Device = "cpu",
    dtype: Dtype = "float32",
) -> None:
    """Attention sinks, dominance of text, entropy and surviving places, layer by layer.

    Of the unpruned model and of every strategy at every budget, on the same samples.
    """
    if shipped.vit(model) is not None:
        raise UnsupportedError(
            f"{model} is a ViT; analyze looks into language models. vtprune show --model {model} "
            "draws what a strategy keeps."
        )
    if task.startswith(LMMS) or len(split(task)) != 1:
        raise ConfigError(f"--task {task!r}: give one task of vtprune list, such as {DEFAULT!r}.")
    if tau is not None and not tau > 0:
        raise ConfigError(f"--tau {tau}: give a number above 0, such as 20.")
    options = {"strategy": strategy, "keep": keep, "reduce": "", "task": task, "hint": hint}
    wanted = asked(None, options, given_of(ctx))
    points = [point for point in wanted.points if point != FLOOR]
    check_folder(out)
    loaded, processor = shipped.load(model, device, dtype)
    settings = settings_of(
        loaded,
        processor,
        model.rstrip("/") or model,
        task=wanted.options["task"],
        limit=samples,
        batch_size=batch_size,
        seed=seed,
        hint=hint,
    )
    settings = replace(settings, max_new_tokens=max_new_tokens)
    chosen = Options(sink_dims, tau, exclude_bos, draw)
    console = Console(highlight=False)
    lenient = "all" in split(strategy)
    analysis = Analysis(loaded, processor, points, settings, chosen, lenient=lenient)
    for note in analysis.refused.values():
        console.print(f"[yellow]{escape(note)}[/yellow]", soft_wrap=True)
    with progress_bar(console) as progress:
        bar = progress.add_task("answers", total=analysis.total)
        done = analysis.look(lambda n: progress.advance(bar, n))
    _tell(console, ctx, analysis, done, out)
    if done < samples:
        console.print(f"Interrupted after {done} of {samples} samples.")
        raise typer.Exit(130)


def _tell(console: Console, ctx: typer.Context, analysis: Analysis, done: int, out: Path) -> None:
    """Prints and writes what was seen of the ``done`` samples."""
    settings, options = analysis.settings, analysis.options
    founds = [tally.found() for tally in analysis.tallies]
    known = measured_on(
        analysis.model,
        settings.model,
        _command(ctx),
        fingerprint=settings.fingerprint,
        task=settings.task,
        hint=settings.hint,
        samples=done,
        batch_size=settings.batch_size,
        seed=settings.seed,
        max_new_tokens=settings.max_new_tokens,
        sink_dims=list(analysis.dims),
        sink_dims_given=not analysis.finds,
        tau=analysis.tau,
        exclude_bos=options.exclude_bos,
        left_out=list(analysis.refused.values()),
    )
    console.print(showing.conditions(known), soft_wrap=True, markup=False)
    for table in showing.tables(founds):
        console.print(table)
    console.print("\n".join(showing.LEGEND), markup=False)
    showing.write(out, founds, known, analysis.album.gallery())
    console.print(f"Files: {escape(str(out))}", soft_wrap=True)


def _command(ctx: typer.Context) -> str:
    """Returns the command line, with the options that were given."""
    words = ["vtprune", "analyze"]
    for name in sorted(given_of(ctx), key=list(ctx.params).index):
        flag = f"--{name.replace('_', '-')}"
        words += [flag] if ctx.params[name] is True else [flag, str(ctx.params[name])]
    return shlex.join(words)
