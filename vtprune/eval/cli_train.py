"""``vtprune train``, and the options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from vtprune.errors import ConfigError
from vtprune.eval import mini_vit, shipped
from vtprune.eval import train_gates as gating
from vtprune.eval import train_saisa as projecting
from vtprune.eval import train_vits as in_vits
from vtprune.eval.output import progress_bar
from vtprune.registry import strategy_class

Model = Annotated[str, typer.Option(help="Shipped model, directory of a saved one, or hub id.")]
Device = Annotated[str, typer.Option(help="As torch names it.")]
Dtype = Annotated[str, typer.Option(help=f"One of {', '.join(shipped.DTYPES)}.")]


def train(
    strategy: Annotated[
        str,
        typer.Argument(
            help="dyvte: its gates; saisa: its projectors; sparsifiner, dynamicvit, crossget: what "
            "they add to a ViT; dependencyvit: a ViT of its own."
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            help="Shipped model, directory of a saved one, or hub id; by default "
            f"{shipped.DEFAULT}, {mini_vit.NAME} of strategies for ViTs."
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            min=8,
            help="Scenes: 512, of which a quarter calibrates; of saisa 12000; of the strategies "
            "for ViTs pictures, "
            f"{', '.join(f'{n} of {name}' for name, n in in_vits.PICTURES.items())}.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="File to write, by default .safetensors named by what it holds, or the folder of "
            "dependencyvit; resumed beside it."
        ),
    ] = None,
    form: Annotated[
        str | None, typer.Option(help="Gates: shared (a small one, the default) or per_layer.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=10**9, help="Of the weights.")] = 0,
    device: Device = "cpu",
    dtype: Dtype = "float32",
) -> None:
    """Train what a strategy asks of a model, from answers that the model gives itself."""
    known = ("dyvte", "saisa", *in_vits.PICTURES)
    if strategy not in known:
        strategy_class(strategy)
        raise ConfigError(f"{strategy} has nothing to train; only {', '.join(known)} do.")
    if form is not None and strategy != "dyvte":
        raise ConfigError(f"--form {form} is of the gates of dyvte; leave it out for {strategy}.")
    if strategy in in_vits.PICTURES:
        _in_vit(strategy, model or mini_vit.NAME, samples, out, seed, device, dtype)
        return
    model = model or shipped.DEFAULT
    gates = strategy == "dyvte"
    out = out or Path("gates.safetensors" if gates else "projectors.safetensors")
    number = samples or (512 if gates else 12000)
    console = Console(highlight=False, soft_wrap=True)
    with progress_bar(console) as progress:
        bar = progress.add_task("samples", total=number)
        how: dict[str, Any] = {"samples": number, "seed": seed, "device": device, "dtype": dtype}
        how["advance"] = lambda n: progress.advance(bar, n)
        if gates:
            lines = gating.told(gating.train_dyvte(model, out, form=form or "shared", **how))
        else:
            lines = projecting.told(projecting.train_saisa(model, out, **how))
    console.print("\n".join(lines))
    use = "keep=..., gates=FILE" if gates else "projectors=FILE"
    console.print(f"File: {escape(str(out))}; wrap(model, '{strategy}', {use}).")


def _in_vit(
    strategy: str,
    model: str,
    samples: int | None,
    out: Path | None,
    seed: int,
    device: str,
    dtype: str,
) -> None:
    if dtype != "float32":
        raise ConfigError(
            f"--dtype {dtype}: what {strategy} adds to a ViT is trained in float32, under bfloat16 "
            "autocast. Leave it out."
        )
    out = out or Path(in_vits.OUT[strategy])
    in_vits.train_vit(strategy, model, out, samples=samples, seed=seed, device=device)
    typer.echo(f"Written: {out}; wrap(model, '{strategy}', {in_vits.USE[strategy]}).")
