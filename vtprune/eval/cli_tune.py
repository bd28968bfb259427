"""``vtprune tune``: the cheapest setting that holds a bound, as a file that ``wrap`` takes."""

from __future__ import annotations

import math
import statistics
from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from vtprune.errors import ConfigError
from vtprune.eval import shipped
from vtprune.eval.asked import asked
from vtprune.eval.cli_train import Device, Dtype
from vtprune.eval.cli_words import command, given_of
from vtprune.eval.output import progress_bar
from vtprune.eval.results import Folder, check_folder, write_whole
from vtprune.eval.sweep import Sweep, settings_of
from vtprune.eval.sweep_vit import Classifying
from vtprune.eval.tune import FILE, LADDER, STRATEGIES, Outcome, Parts, setting_of, tune
from vtprune.eval.tune_search import MaxDrop, MaxMs, Round, Seen
from vtprune.eval.tune_stats import needed, upper_limit
from vtprune.registry import unknown

BY = ("flops", "ms")
TUNABLE = (Sweep, Classifying)  # each sample right or wrong, whatever the others


def tune_command(
    ctx: typer.Context,
    model: Annotated[
        str, typer.Argument(help="Shipped model, directory of a saved one, or hub id.")
    ],
    max_drop: Annotated[
        float | None,
        typer.Option(help="Points of accuracy that may be lost: the cheapest such setting."),
    ] = None,
    max_ms: Annotated[
        float | None,
        typer.Option(help="Milliseconds per sample: the most accurate setting within them."),
    ] = None,
    confidence: Annotated[float, typer.Option(help="That the bound holds, 0.5 to 1.")] = 0.95,
    by: Annotated[
        str | None,
        typer.Option(help="What is cheap with --max-drop: flops of the prefill (default), or ms."),
    ] = None,
    strategy: Annotated[
        str, typer.Option(help="Names with commas, options as in 'zipvl(tau=0.96)'; or 'all'.")
    ] = ",".join(STRATEGIES),
    keep: Annotated[str, typer.Option(help="Budgets to try, with commas.")] = ",".join(LADDER),
    reduce: Annotated[
        str, typer.Option(help="Of ViTs, with commas: 8 leave per block; 0.5 of the FLOPs saved.")
    ] = "",
    task: Annotated[str, typer.Option(help="Names with commas; see list. By model.")] = "",
    limit: Annotated[
        int, typer.Option(min=2, help="Samples per task: a third to search, the rest to test.")
    ] = 1500,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples per batch.")] = 16,
    out: Annotated[Path, typer.Option(help=f"Folder for {FILE} and results; resumed.")] = Path(
        "tune"
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
    """Search strategies and budgets for the best setting that holds a bound, and confirm it."""
    goal = goal_of(max_drop, max_ms, confidence, by)
    names = ("strategy", "keep", "reduce", "task", "hint")
    options = {name: str(ctx.params[name]) for name in names}
    wanted = asked(shipped.vit(model), options, given_of(ctx))
    if wanted.sweep not in TUNABLE:
        raise ConfigError(
            f"{model}, --task {wanted.options['task']}: scored as a whole, so its samples cannot "
            "be split into some to search on and some to test on. Give a task of the list, of "
            "which each sample is right or wrong by itself."
        )
    parts = Parts.of(limit, len(wanted.tasks), batch_size)
    parts.check(goal)
    check_folder(out)
    console = Console(highlight=False, soft_wrap=True)
    try:
        loaded, processor = shipped.load(model, device, dtype)
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
        sweep = wanted.sweep(loaded, processor, wanted.points, settings, lenient=True)
        with closing(Folder(out, settings)) as folder:
            folder.remember(command(ctx))
            for note in [*sweep.refused.values(), *folder.damage]:
                console.print(f"[yellow]{escape(note)}[/yellow]")
            outcome = _tuned(sweep, folder, goal, parts, console)
    except KeyboardInterrupt:
        lines = f"Interrupted; what was measured is in {out}. This resumes:\n{command(ctx)}"
        console.print(lines, markup=False)
        raise typer.Exit(130) from None
    file = out / FILE
    file.unlink(missing_ok=True)  # that of an earlier bound
    if outcome.best is None:
        console.print(_nothing(outcome, goal), markup=False)
        raise typer.Exit(1)
    write_whole(file, setting_of(outcome.best, outcome, goal, settings).text())
    console.print(f"File: {file}; wrap(model, '{file}'), or --strategy {file}.", markup=False)


def goal_of(
    max_drop: float | None, max_ms: float | None, confidence: float, by: str | None
) -> MaxDrop | MaxMs:
    """Returns what the options seek.

    Raises:
        ConfigError: not exactly one bound, or a value out of range.
    """
    if (max_drop is None) == (max_ms is None):
        raise ConfigError(
            "Give one bound: --max-drop, in points of accuracy, or --max-ms, in milliseconds per "
            "sample."
        )
    if not 0.5 < confidence < 1:
        raise ConfigError(
            f"--confidence {confidence:g} is none; give one between 0.5 and 1, such as 0.95."
        )
    if max_ms is not None:
        if by is not None:
            raise ConfigError(f"--by {by} is of --max-drop; with --max-ms time is the bound.")
        if not 0 < max_ms < math.inf:
            raise ConfigError(f"--max-ms {max_ms:g} is no time; give one above 0.")
        return MaxMs(max_ms, confidence)
    if by not in (None, *BY):
        raise unknown("cost", str(by), BY)
    if max_drop is None or not 0 < max_drop < 100:
        raise ConfigError(f"--max-drop {max_drop}: give points above 0 and below 100, such as 1.")
    return MaxDrop(max_drop / 100, confidence, by or BY[0])


def _tuned(
    sweep: Sweep, folder: Folder, goal: MaxDrop | MaxMs, parts: Parts, console: Console
) -> Outcome:
    """Runs the search and the test, and prints what they find as they go."""
    with progress_bar(console) as progress:
        bar = progress.add_task("answers", total=parts.answers(len(sweep.points)))
        outcome = tune(
            sweep,
            folder,
            goal,
            parts,
            lambda one: console.print(_round(one), markup=False),
            lambda n: progress.advance(bar, n),
        )
    if outcome.sees is False:
        console.print(
            "On these samples the unpruned model is not shown to answer better than without "
            "images, so they cannot tell what visual tokens are for. Choose another --task.",
            style="yellow",
        )
    for seen, holds in outcome.tested:
        console.print(_test(seen, holds, goal), markup=False)
    return outcome


def _round(one: Round) -> str:
    """Returns what a round of the search found."""
    return (
        f"{one.best.paired.n} samples: {one.measured} settings, {one.stay} stay; most promising "
        f"{_name(one.best)}, {_cost(one.best)}, drop {100 * one.best.paired.drop:.1f} points"
    )


def _test(seen: Seen, holds: bool, goal: MaxDrop | MaxMs) -> str:
    """Returns what the test of a setting found."""
    n, limit = seen.paired.n, upper_limit(seen.paired, goal.confidence)
    verdict = "holds the bound" if holds else "not shown to hold the bound"
    return (
        f"{n} fresh samples: {_name(seen)}, {_cost(seen)}, {100 * seen.right / n:.1f} % right "
        f"(unpruned {100 * seen.unpruned_right / n:.1f}), drop {100 * seen.paired.drop:.1f} "
        f"points, at most {100 * limit:.1f} with confidence {goal.confidence:g}: {verdict}"
    )


def _name(seen: Seen) -> str:
    return f"{seen.point.strategy} {seen.point.budget}"


def _cost(seen: Seen) -> str:
    """Returns FLOPs and time, as far as they are known."""
    parts = [] if seen.flops is None else [f"{100 * seen.flops:.1f} % of the FLOPs"]
    if seen.ms and seen.unpruned_ms:
        parts.append(
            f"{seen.median_ms:.1f} ms (unpruned {statistics.median(seen.unpruned_ms):.1f})"
        )
    return ", ".join(parts)


def _nothing(outcome: Outcome, goal: MaxDrop | MaxMs) -> str:
    """Returns why nothing was written, and what would help."""
    said = "No setting was shown to hold the bound, so nothing was written."
    seen, _ = outcome.tested[0]
    if isinstance(goal, MaxMs):
        return f"{said} The fastest tried takes {seen.median_ms:.1f} ms per sample."
    wanted = needed(seen.paired, goal.bound, goal.confidence)
    if wanted is None:
        return f"{said} The safest tried loses as much as the bound, or more."
    return f"{said} If answers change as they did here, about {wanted} fresh samples would do."
