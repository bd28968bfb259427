"""Time to the first token of a LLaVA with 576 visual tokens: unpruned, pruned, pruned for free.

*Free pruning* is the bound that no strategy before the language model can beat: the same encoder
call, then the same language model on a prompt that somebody else has already shortened. The ratio
strategy / free is what a strategy costs on top. Weights are random, which changes no time. Calls
are interleaved (one of each per round), so a slow spell of the machine hits all of them alike;
ratios are taken within a round. A second call per round, with its phases timed, says what reading
signals, deciding and shortening take (*costs*), and by how much tower and prefill are faster than
unpruned when that is not counted (*saved*).
"""

from __future__ import annotations

import argparse
import platform
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import vtprune
from vtprune.engine.report import Report
from vtprune.eval.train_gates import Labelled, Reading, margins_of
from vtprune.gates import make, save
from vtprune.projectors import Projector, Projectors
from vtprune.registry import build, strategy_names
from vtprune.types import Strategy

IMAGE, VOCAB = 999, 1000
SIDE, PATCH = 336, 14
N = (SIDE // PATCH) ** 2
WORDS = 32


class Processor:
    """As much of a processor as a strategy guided by text asks for."""

    class tokenizer:
        """Has no special tokens in ``prompt``."""

        all_special_ids = (0, 1, 2)


@dataclass(frozen=True)
class Round:
    """One round of a call: milliseconds to the first token, and the report of the timed call."""

    ms: float
    report: Report | None = None

    def added(self) -> float:
        """Milliseconds of what a strategy adds."""
        return sum(self.report.parts.values()) if self.report else 0.0

    def without(self, phase: str) -> float:
        """Milliseconds of a phase without what a strategy adds in it."""
        if self.report is None:
            return 0.0
        inside = (ms for part, ms in self.report.parts.items() if part.startswith(f"{phase}."))
        return self.report.ms[phase] - sum(inside)


def build_model(args: argparse.Namespace) -> Any:
    """Returns the model: a CLIP tower and a Llama decoder of the same width."""
    heads = args.width // 64
    vision = CLIPVisionConfig(
        hidden_size=args.width,
        intermediate_size=4 * args.width,
        num_hidden_layers=args.blocks,
        num_attention_heads=heads,
        image_size=SIDE,
        patch_size=PATCH,
    )
    text = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=args.width,
        intermediate_size=args.width * 11 // 4,
        num_hidden_layers=args.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
    )
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE, image_seq_length=N
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration._from_config(config, attn_implementation="sdpa")
    model.generation_config.pad_token_id = 0
    return model.to(args.device, getattr(torch, args.dtype)).eval()


def prompt(n: int, device: torch.device) -> dict[str, Tensor]:
    """Returns ids and mask ``[1, WORDS + n]``: words around one image of ``n`` visual tokens."""
    words = torch.randint(3, 900, (WORDS,), generator=torch.Generator().manual_seed(1))
    ids = torch.cat([words[:4], torch.full((n,), IMAGE), words[4:]])[None].to(device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def first_token(model: Any, inputs: dict[str, Any]) -> float:
    """Returns the milliseconds of ``generate`` up to the first token."""
    began = now(model.device)
    model.generate(**inputs, max_new_tokens=1, do_sample=False)
    return now(model.device) - began


def free(model: Any, pixels: Tensor, short: dict[str, Tensor], keep: int) -> Round:
    """Returns a round of the encoder and of ``generate`` on a prompt that is short."""
    began = now(model.device)
    with torch.no_grad():
        encoded = model.model.get_image_features(pixel_values=pixels, return_dict=True)
    encoded.pooler_output = [rows[:keep] for rows in encoded.pooler_output]
    first_token(model, {**short, "mm_encoder_outputs": {"image": encoded}})
    return Round(now(model.device) - began)


def untrained(model: Any, inputs: dict[str, Any], folder: Path) -> dict[str, Strategy]:
    """Returns the strategies that need training, with random weights: these take as long.

    The gates are calibrated on the prompt that is timed, so that tokens leave as the budget says.
    """
    text, features = model.config.text_config, model.config.vision_config.hidden_size
    depth, width = text.num_hidden_layers, text.hidden_size
    made = Projectors([Projector(features, width, width) for _ in range(depth)])
    found = {"saisa": build("saisa", projectors=made.to(model.device, model.dtype))}
    if depth > 1:  # else there is no layer before which tokens may leave
        gates, reading = make("shared", depth, 2 * width), Reading()
        with vtprune.wrap(model, reading, keep=1.0):
            first_token(model, inputs)
        gates.margins = margins_of(gates, Labelled(reading.states(), torch.zeros(1, depth)))
        save(gates, folder / "gates.safetensors")
        found["dyvte"] = build("dyvte", gates=str(folder / "gates.safetensors"))
    return found


def wrapped(model: Any, strategy: Strategy, keep: int | float) -> vtprune.Handle:
    """Returns the handle of a strategy; one from which no token leaves gets no budget."""
    budget = None if strategy.kind == "compute" else keep
    return vtprune.wrap(model, strategy, keep=budget, processor=Processor())


def pruned(model: Any, inputs: dict[str, Any], strategy: Strategy, keep: int | float) -> Round:
    """Returns a round under a strategy; installing and removing it are not counted."""
    with wrapped(model, strategy, keep) as handle:
        ms = first_token(model, inputs)
        handle.timing = True
        first_token(model, inputs)
    return Round(ms, handle.report())


def unpruned(model: Any, inputs: dict[str, Any]) -> Round:
    """Returns a round of the bare model; its phases are those of a handle that keeps all."""
    return replace(pruned(model, inputs, build("strided"), 1.0), ms=first_token(model, inputs))


def fitting(
    model: Any, strategies: dict[str, Strategy], keep: int
) -> tuple[dict[str, Strategy], list[str]]:
    """Returns the strategies that take the model and the budget, and what the others say."""
    fit, refused = {}, []
    for name, strategy in strategies.items():
        try:
            wrapped(model, strategy, keep).remove()
            fit[name] = strategy
        except vtprune.VTPruneError as error:
            refused.append(f"{name} left out: {error}")
    return fit, refused


def now(device: torch.device) -> float:
    """Returns milliseconds, after everything queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1000 * time.perf_counter()


def measure(calls: dict[str, Callable[[], Round]], rounds: int) -> dict[str, list[Round]]:
    """Returns the rounds of each call, after one of warm-up."""
    found: dict[str, list[Round]] = {name: [] for name in calls}
    for i in range(rounds + 1):
        for name, call in calls.items():
            this = call()
            if i:
                found[name].append(this)
    return found


def table(found: dict[str, list[Round]]) -> str:
    """Returns medians and per-round ratios as Markdown."""
    lines = [
        "| call | ms (median) | ms (min - max) | / unpruned | / free |",
        "|---|--:|--:|--:|--:|",
    ]
    for name, rounds in found.items():
        ms = [one.ms for one in rounds]
        ratios = [
            statistics.median(a.ms / b.ms for a, b in zip(rounds, found[base], strict=True))
            for base in ("unpruned", "free")
        ]
        lines.append(
            f"| {name} | {statistics.median(ms):.0f} | {min(ms):.0f} - {max(ms):.0f} "
            f"| {ratios[0]:.3f} | {ratios[1]:.3f} |"
        )
    return "\n".join(lines)


def balance(found: dict[str, list[Round]]) -> str:
    """Returns as Markdown what each strategy costs, beside what it saves."""
    lines = [
        "| strategy | costs, ms | tower saved, ms | prefill saved, ms | visual tokens in a layer "
        "| prefill FLOPs, % | cache, MiB |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name, rounds in found.items():
        report, pairs = rounds[0].report, list(zip(rounds, found["unpruned"], strict=True))
        if report is None:
            continue
        ms = [statistics.median(one.added() for one in rounds)]
        ms += [
            statistics.median(b.without(phase) - a.without(phase) for a, b in pairs)
            for phase in ("encode", "language")
        ]
        held = 0 if report.cache is None else report.cache.held / 2**20
        lines.append(
            f"| {name} | {' | '.join(f'{x:.1f}' for x in ms)} | {report.of_sample(0)[1]:.4g} "
            f"| {100 * report.prefill().share:.1f} | {held:.2f} |"
        )
    return "\n".join(lines)


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
            f"transformers {transformers.__version__}, Python {platform.python_version()}",
            f"device: {device}, {torch.get_num_threads()} threads, {args.dtype}, sdpa, batch 1",
            f"model: {args.blocks} tower blocks, {args.layers} decoder layers, width {args.width}, "
            f"{parameters:.0f} M parameters; {N} visual tokens of a {SIDE} px image, {WORDS} words",
            f"keep {args.keep}; medians of {args.rounds} interleaved rounds, pixels to first token",
        ]
    )


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--keep", type=int, default=64, help="visual tokens that stay")
    parser.add_argument("--blocks", type=int, default=12, help="of the vision tower")
    parser.add_argument("--layers", type=int, default=12, help="of the decoder")
    parser.add_argument("--width", type=int, default=1024, help="of both; a multiple of 64")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--strategies", nargs="+", default=strategy_names(), metavar="NAME")
    args = parser.parse_args()
    if args.rounds < 1 or args.width < 64 or args.width % 64:
        parser.error("--rounds must be at least 1, and --width a multiple of 64")
    if not 1 <= args.keep <= N:
        parser.error(f"--keep must be 1 to {N}")
    return args


def main() -> None:
    """Builds model and input, and measures."""
    args = parse()
    model = build_model(args)
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randn(1, 3, SIDE, SIDE, generator=generator).to(model.device, model.dtype)
    inputs = {**prompt(N, model.device), "pixel_values": pixels}
    with tempfile.TemporaryDirectory() as folder:
        trained = untrained(model, inputs, Path(folder))
        given = {name: trained.get(name) or build(name) for name in args.strategies}
        report(args, model, pixels, inputs, given)


def report(
    args: argparse.Namespace,
    model: Any,
    pixels: Tensor,
    inputs: dict[str, Any],
    strategies: dict[str, Strategy],
) -> None:
    """Measures the strategies that fit and prints the tables."""
    short = prompt(args.keep, model.device)
    fit, refused = fitting(model, strategies, args.keep)
    calls: dict[str, Callable[[], Round]] = {
        "unpruned": lambda: unpruned(model, inputs),
        "free": lambda: free(model, pixels, short, args.keep),
    }
    for name, strategy in fit.items():
        calls[name] = partial(pruned, model, inputs, strategy, args.keep)
    found = measure(calls, args.rounds)
    print(conditions(args, model), table(found), balance(found), *refused, sep="\n\n")


if __name__ == "__main__":
    main()
