"""Images per second of a ViT against its GFLOPs: unpruned, and every strategy that fits.

The model is timm's DeiT-S with random weights, which change no time. Strategies save a share of the
FLOPs (``--saved``); those that count by the image get ``--keep`` instead, and what is trained for
some is random here, as the ViT is. ToMe is also run as its
authors run it, with 13 and with 16 tokens less after each block. Calls are interleaved (one of each
per round), so that a slow spell of the machine hits all of them alike; ratios are taken within a
round. Installing a strategy is not timed, choosing and merging are.
"""

from __future__ import annotations

import argparse
import platform
import shlex
import statistics
import sys
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from torch import Tensor, nn

import vtprune
from vtprune.engine.instance import now
from vtprune.eval import train_sparsifiner
from vtprune.registry import strategy_class, strategy_names
from vtprune.scoring.keeping import Keeper
from vtprune.strategies.dynamicvit import BEFORE

OFFICIAL = (13, 16)  # tokens that leave per block in ToMe's paper


@dataclass(frozen=True)
class Call:
    """A strategy and its budget, as ``wrap`` takes them; without a strategy the bare model."""

    name: str
    strategy: str | None = None
    keep: float | None = None
    reduce: int | float | None = None
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    def install(self, model: Any) -> Any:
        """Returns the handle."""
        budget = {"keep": self.keep, "reduce": self.reduce}
        return vtprune.wrap(model, self.strategy or "strided", **budget, **self.options)


def untrained(name: str, model: Any, where: dict[str, Any]) -> dict[str, Any]:
    """Returns options that stand for what a strategy has to be trained for."""
    if name == "dynamicvit":
        heads = [Keeper(model.embed_dim) for _ in BEFORE]
        return {"keepers": nn.ModuleList(heads).to(**where)}
    if name == "sparsifiner":
        tokens = model.pos_embed.shape[1]
        d = model.blocks[0].attn.head_dim
        heads = [train_sparsifiner.begin(tokens, d) for _ in model.blocks]
        return {"predictors": nn.ModuleList(heads).to(**where)}
    return {}


def fitting(
    model: Any, pixels: Tensor, names: list[str], saved: float, keep: float
) -> tuple[list[Call], list[str]]:
    """Returns a call for each strategy that takes the model, and what the others say."""
    found, refused, reason = [], [], ""
    for name in names:
        computes = strategy_class(name).kind == "compute"  # whose options say how much
        options = untrained(name, model, {"device": pixels.device})
        calls = [
            Call(name, name, reduce=saved, options=options),
            Call(f"{name} (keep {keep:g})", name, keep, options=options),
        ]
        for call in [Call(name, name, options=options)] if computes else calls:
            try:
                report = one(model, pixels[:1], call)[1]  # some say only now what they cannot do
            except vtprune.VTPruneError as error:
                reason = str(error)
                continue
            if computes or report.tower().share < 1:
                found.append(call)
                break
            reason = "it acts on what leaves the last block, so that nothing is saved."
        else:
            refused.append(f"{name} left out: {reason}")
    return found, refused


@torch.inference_mode()
def timed(model: Any, pixels: Tensor) -> float:
    """Returns the seconds of one forward pass."""
    began = now(pixels.device)
    model(pixels)
    return now(pixels.device) - began


def one(model: Any, pixels: Tensor, call: Call) -> tuple[float, Any]:
    """Returns the seconds of a call, and its report (None of the bare model)."""
    if call.strategy is None:
        return timed(model, pixels), None
    with call.install(model) as handle:
        return timed(model, pixels), handle.report()


def measure(
    model: Any, pixels: Tensor, calls: list[Call], rounds: int
) -> dict[Call, list[tuple[float, Any]]]:
    """Returns the rounds of each call, after one of warm-up."""
    found: dict[Call, list[tuple[float, Any]]] = {call: [] for call in calls}
    for i in range(rounds + 1):
        for call in calls:
            this = one(model, pixels, call)
            if i:
                found[call].append(this)
    return found


def table(found: dict[Call, list[tuple[float, Any]]], batch: int, whole: float) -> str:
    """Returns medians and per-round ratios as Markdown; ``whole`` are the GFLOPs unpruned."""
    lines = [
        "| call | GFLOPs | % | images/s (median) | (min - max) | x unpruned | (min - max) |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    base = next(iter(found.values()))
    for call, rounds in found.items():
        share = 1.0 if rounds[0][1] is None else rounds[0][1].tower().share
        pace = [batch / seconds for seconds, _ in rounds]
        ratios = [b[0] / a[0] for a, b in zip(rounds, base, strict=True)]
        lines.append(
            f"| {call.name} | {whole * share:.2f} | {100 * share:.1f} "
            f"| {statistics.median(pace):.1f} | {min(pace):.1f} - {max(pace):.1f} "
            f"| {statistics.median(ratios):.2f} | {min(ratios):.2f} - {max(ratios):.2f} |"
        )
    return "\n".join(lines)


def blocks(found: dict[Call, list[tuple[float, Any]]]) -> str:
    """Returns how many tokens, CLS included, enter each block under the official schedules."""
    return "\n".join(
        f"{call.name}: {', '.join(map(str, rounds[0][1].tiles[0].attended))}"
        for call, rounds in found.items()
        if call.name.startswith("tome r=")
    )


def conditions(args: argparse.Namespace, model: Any) -> str:
    """Returns what a figure means nothing without."""
    device = platform.processor() or platform.machine()
    if args.device.startswith("cuda"):
        device = torch.cuda.get_device_name()
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    return "\n".join(
        [
            f"command: {shlex.join(['python', *sys.argv])}",
            f"versions: vtprune {vtprune.__version__}, torch {torch.__version__}, "
            f"timm {timm.__version__}, Python {platform.python_version()}",
            f"device: {device}, {torch.get_num_threads()} threads, {args.dtype}, "
            f"batch {args.batch}, {args.size} px",
            f"model: {args.model}, {parameters:.1f} M parameters, random weights; "
            f"{args.rounds} interleaved rounds after one of warm-up",
        ]
    )


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="deit_small_patch16_224", help="of timm")
    parser.add_argument("--size", type=int, default=224, help="pixels of an image's side")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--saved", type=float, default=0.5, help="share of the FLOPs")
    parser.add_argument("--keep", type=float, default=0.25, help="where they cannot be foreseen")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--strategies", nargs="+", default=strategy_names(), metavar="NAME")
    args = parser.parse_args()
    if min(args.rounds, args.batch) < 1:
        parser.error("--rounds and --batch must be at least 1")
    if not 0 < args.saved < 1 or not 0 < args.keep <= 1:
        parser.error("--saved and --keep are shares between 0 and 1")
    return args


def main() -> None:
    """Builds model and input, measures, and prints the tables."""
    args = parse()
    torch.manual_seed(0)
    where: dict[str, Any] = {"device": args.device, "dtype": getattr(torch, args.dtype)}
    model = timm.create_model(args.model, img_size=args.size).to(**where).eval()
    pixels = torch.randn(args.batch, 3, args.size, args.size).to(**where)
    calls, refused = fitting(model, pixels, args.strategies, args.saved, args.keep)
    calls = [Call("unpruned"), *calls, *(Call(f"tome r={r}", "tome", reduce=r) for r in OFFICIAL)]
    found = measure(model, pixels, calls, args.rounds)
    whole = 2 * next(iter(found[calls[-1]]))[1].tiles[0].cost().unpruned / 1e9
    tokens = f"Tokens that enter each block, with [CLS]:\n{blocks(found)}"
    print(conditions(args, model), table(found, args.batch, whole), tokens, *refused, sep="\n\n")


if __name__ == "__main__":
    main()
