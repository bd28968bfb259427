"""``vtprune bench``: where the time of a model goes, and what the package's parts cost."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup

from vtprune.errors import ConfigError, UnsupportedError
from vtprune.eval import bench_kernels as measuring
from vtprune.eval import bench_model_output as showing
from vtprune.eval import bench_results as writing
from vtprune.eval import shipped
from vtprune.eval.asked import asked
from vtprune.eval.bench_model import Bench
from vtprune.eval.bench_model_inputs import Asked, Made, default_size, parse_size
from vtprune.eval.bench_model_random import config_names, random_model
from vtprune.eval.bench_model_rows import CONTROL, Row
from vtprune.eval.bench_ops import OPS
from vtprune.eval.budgets import CEILING, FLOOR, Point, split
from vtprune.eval.cli_words import given_of
from vtprune.eval.output import progress_bar
from vtprune.eval.results import check_folder
from vtprune.registry import unknown

STRATEGIES = "fastervlm,visionzip,divprune,fastv"
COMMAND = "model"  # what is meant where no command is named


class _Benchmarks(TyperGroup):
    """Takes a first word that names no command for the model to be timed."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, *ctx.help_option_names):
            args = [COMMAND, *args]
        return super().parse_args(ctx, args)


bench = typer.Typer(
    cls=_Benchmarks,
    no_args_is_help=True,
    help="Time a model by phase: vtprune bench MODEL. Or parts of the package.",
)


@bench.command(COMMAND)
def model_(
    ctx: typer.Context,
    model: Annotated[
        str, typer.Argument(help="Shipped model, directory of a saved one, or hub id.")
    ] = "",
    random_weights: Annotated[
        str,
        typer.Option(
            metavar="CONFIG",
            help="In place of a model: its shapes, with random weights. A config.json, or of "
            f"{', '.join(config_names())}.",
        ),
    ] = "",
    strategy: Annotated[
        str, typer.Option(help="Names with commas, options as in 'zipvl(tau=0.96)'; or 'all'.")
    ] = STRATEGIES,
    keep: Annotated[
        str, typer.Option(help="Budgets with commas: 64 is tokens; 0.25 or 25% is a share.")
    ] = "25%",
    batch_size: Annotated[str, typer.Option(help="Rows per call, with commas.")] = "1",
    resolution: Annotated[
        str, typer.Option(help="Pixels with commas, such as 672 or 672x448; by model.")
    ] = "",
    decode_tokens: Annotated[int, typer.Option(min=1, help="Tokens after the first one.")] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each setting, after a first.")] = 5,
    attention: Annotated[
        str, typer.Option(help="As transformers names it: sdpa, flash_attention_2, eager.")
    ] = "sdpa",
    device: Annotated[str, typer.Option(help="As torch names it; the first GPU, or cpu.")] = "",
    dtype: Annotated[
        str,
        typer.Option(
            help=f"One of {', '.join(measuring.DTYPES)}; by default float32 on CPUs, bfloat16 on "
            "GPUs."
        ),
    ] = "",
    out: Annotated[
        Path | None, typer.Option(help="Folder for bench.json and bench.md; none by default.")
    ] = None,
) -> None:
    """Time of a model by phase and strategy, beside unpruned, random and free pruning.

    The word 'model' may be left out: vtprune bench mini-llava.
    """
    place, dtype = _where(device, dtype)
    batches = [_positive("--batch-size", text) for text in split(batch_size) or ("",)]
    sizes = [parse_size(text) for text in split(resolution)]
    options = {"strategy": strategy, "keep": keep, "reduce": "", "task": "", "hint": ""}
    wanted = [p for p in asked(None, options, given_of(ctx)).points if p not in (CEILING, FLOOR)]
    controls = [Point(CONTROL, p.budget) for p in wanted if p.budget != CEILING.budget]
    if out is not None:
        check_folder(out)
    loaded, prompts = _subject(model, random_weights, place, dtype, attention)
    own = None if random_weights else prompts.processor
    console = Console(highlight=False)
    with console.status("Recording prompts"):
        run = Bench(
            loaded,
            prompts,
            list(dict.fromkeys([*controls, *wanted])),
            batches=batches,
            sizes=sizes or [default_size(loaded.config, own)],
            decode_tokens=decode_tokens,
            lenient="all" in split(strategy),
        )
    for note in run.refused:
        console.print(f"[yellow]{escape(note)}[/yellow]", soft_wrap=True)
    with progress_bar(console) as progress:
        bar = progress.add_task("turns", total=(rounds + 1) * run.turns)
        done = run.run(rounds, lambda n: progress.advance(bar, n))
    settings = showing.settings_of(
        loaded,
        model or random_weights,
        _command(ctx),
        random_weights=bool(random_weights),
        batch_sizes=batches,
        resolutions=list(dict.fromkeys(group.resolution for group in run.groups)),
        words=run.words,
        decode_tokens=decode_tokens,
        rounds=done,
        left_out=run.refused,
    )
    _tell(console, run.rows(), settings, out)
    if done < rounds:
        console.print(f"Interrupted after {done} of {rounds} rounds.")
        raise typer.Exit(130)


def _tell(console: Console, rows: list[Row], settings: dict[str, Any], out: Path | None) -> None:
    """Prints what was measured, and writes it where a folder is asked for."""
    console.print(showing.conditions(settings), soft_wrap=True, markup=False)
    for table in showing.tables(rows):
        console.print(table)
    console.print("\n".join(showing.legend()), markup=False)
    if out is not None:
        showing.write(out, rows, settings)
        console.print(f"Files: {escape(str(out))}", soft_wrap=True)


def _where(device: str, dtype: str) -> tuple[torch.device, str]:
    """Returns the device and the dtype that are asked for, or usual.

    Raises:
        ConfigError: they cannot be used.
    """
    place = measuring.usable(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if place.type not in ("cpu", "cuda"):
        raise ConfigError(f"device={str(place)!r} cannot be timed; give cpu or cuda.")
    dtype = dtype or measuring.DTYPES[measuring.on_gpu(place)]
    if dtype not in measuring.DTYPES:
        raise unknown("dtype", dtype, measuring.DTYPES)
    return place, dtype


def _positive(option: str, text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"{option} {text!r}: give whole numbers from 1 on, such as 1 or 1,8.")
    return int(text)


def _subject(
    model: str, random_weights: str, place: torch.device, dtype: str, attention: str
) -> tuple[Any, Asked | Made]:
    """Returns the model to time, and what makes its inputs.

    Raises:
        ConfigError: none or two are asked for, or it is not to be had.
        UnsupportedError: it is a ViT.
    """
    if bool(model) == bool(random_weights):
        raise ConfigError(
            f"MODEL {model!r} and --random-weights {random_weights!r}: give one of the two, such "
            f"as 'vtprune bench {shipped.DEFAULT}', 'vtprune bench --random-weights llava-300m'."
        )
    if random_weights:
        made = random_model(random_weights, place, dtype, attention)
        return made, Made(made)
    if shipped.vit(model) is not None:
        raise UnsupportedError(
            f"{model} is a ViT; bench measures vision-language models. vtprune sweep --model "
            f"{model} has its images per second."
        )
    loaded, processor = shipped.load(model, str(place), dtype)
    try:
        loaded.set_attn_implementation(attention)
    except (ImportError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f"--attention {attention!r} cannot be used: {reason}") from error
    return loaded, Asked(loaded, processor)


def _command(ctx: typer.Context) -> str:
    """Returns the command line, with the options that were given."""
    words = ["vtprune", "bench", *([ctx.params["model"]] if ctx.params["model"] else [])]
    for name in sorted(given_of(ctx) - {"model"}, key=list(ctx.params).index):
        words += [f"--{name.replace('_', '-')}", str(ctx.params[name])]
    return shlex.join(words)


@bench.command()
def kernels(
    op: Annotated[
        str, typer.Option(help=f"Operations with commas, of {', '.join(OPS)}; all if left out.")
    ] = "",
    provider: Annotated[
        str, typer.Option(help=f"With commas, of {', '.join(measuring.PROVIDERS)}; or all.")
    ] = "",
    dtype: Annotated[
        str,
        typer.Option(
            help=f"With commas, of {', '.join(measuring.DTYPES)}; by default float32 on CPUs, "
            "bfloat16 on GPUs."
        ),
    ] = "",
    device: Annotated[str, typer.Option(help="As torch names it; the first GPU, or cpu.")] = "",
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes, as CPUs need.")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Turns that each provider has.")] = 5,
    out: Annotated[Path, typer.Option(help="File to add rows to, .csv.")] = Path("kernels.csv"),
) -> None:
    """Time of the operations in torch and as kernels, against what the device can do at best."""
    place = measuring.usable(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    usual = measuring.DTYPES[measuring.on_gpu(place)]
    ops = chosen("operation", op, tuple(OPS), tuple(OPS))
    providers = chosen("provider", provider, measuring.PROVIDERS, measuring.PROVIDERS)
    dtypes = chosen("dtype", dtype, measuring.DTYPES, (usual,))
    writing.check_file(out)
    cases = measuring.cases(ops, dtypes, quick)
    multiplied = dict.fromkeys(OPS[case.op].products or case.dtype for case in cases)
    floor = measuring.measure_floor(place, tuple(multiplied), quick)
    conditions = writing.Conditions.of(place, floor)
    typer.echo(f"{conditions}\n\n{writing.HEADER}")
    for case in cases:
        results = measuring.measure(case, providers, place, floor, rounds)
        for result in results:
            typer.echo(writing.line(result))
        writing.append(out, [writing.row(result, conditions) for result in results])
    typer.echo(f"\n{writing.CAPTION}\nRows were added to {out}")


def chosen(what: str, text: str, known: Sequence[str], usual: Sequence[str]) -> Sequence[str]:
    """Returns the names of a list with commas; none means the usual ones.

    Raises:
        ConfigError: a name that is not known.
    """
    names = split(text)
    for name in names:
        if name not in known and text != "all":
            raise unknown(what, name, known)
    return known if text == "all" else names or usual
