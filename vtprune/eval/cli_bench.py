"""``vtprune bench``: what the package's parts cost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer

from vtprune.eval import bench_kernels as measuring
from vtprune.eval import bench_results as writing
from vtprune.eval.bench_ops import OPS
from vtprune.eval.budgets import split
from vtprune.registry import unknown

bench = typer.Typer(no_args_is_help=True, help="Measure what parts of the package cost.")


@bench.callback()
def _group() -> None:
    """Keeps ``kernels`` a command of its own."""


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
