"""What the examples of ViTs share: command line, honest times, and what is told of them."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from _common import run

from vtprune.eval.budgets import parse_keep

__all__ = ["command_line", "pace", "parse", "run", "told"]


def command_line(doc: str | None, *, strategy: str) -> argparse.ArgumentParser:
    """Returns the parser of an example."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a name of the library's, with random weights")
    parser.add_argument("--strategy", default=strategy, help="see `vtprune list` (%(default)s)")
    parser.add_argument(
        "--keep", default="0.25", help="tokens left in the end, or their share (%(default)s)"
    )
    parser.add_argument("--batch", type=int, default=56, help="images (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="timed calls (%(default)s)")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Returns the arguments, checked; ``keep`` is a count (int) or a share (float)."""
    args = parser.parse_args()
    if min(args.batch, args.repeats) < 1:
        parser.error("--batch and --repeats must be at least 1")
    args.keep = parse_keep(args.keep)
    return args


def pace(call: Callable[[], Any], n: int, repeats: int) -> float:
    """Returns images per second: ``n`` by the median of so many calls."""
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return n / statistics.median(seconds)


def told(handle: Any, whole: float, fewer: float) -> None:
    """Prints tokens, operations and images per second, with their conditions."""
    report = handle.report()
    first, cost, n = report.images[0], report.tower(), len(report.images)
    print(f"{report.strategy}: {first.kept} of {first.tokens} patches are left of the first image")
    print(
        f"GFLOPs of the blocks per image: {cost.flops / n / 1e9:.3f} of "
        f"{2 * cost.unpruned / n / 1e9:.3f}"
    )
    print(
        f"images/s: {fewer:.1f}, unpruned {whole:.1f} (CPU, {torch.get_num_threads()} threads, "
        f"batch {n}, float32, after a warm-up)"
    )
