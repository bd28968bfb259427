"""Time of a greedy selection, against its rule computed anew at every step.

The naive forms evaluate at every step the whole of what the rule says: the nearest of all picked
tokens (DivPrune, ``max_min``), the sum of distances to all of them (``max_sum``), the nearest
against the relevance (``mmr``), or a Cholesky factor of the picked tokens' kernel (``dpp``). One
computes the cosines to all picked tokens anew as well, the other keeps those of all pairs, as
DivPrune's authors do. Tokens are random, and all must pick the same ones. The first pick of
``max_min`` needs the cosines of all pairs whoever computes it, so its steps are also timed alone: K
picks less one pick, against the form that keeps cosines.
"""

from __future__ import annotations

import argparse
import platform
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, get_args

import torch
from torch import Tensor

import vtprune
from vtprune.eval.bench_results import name_of
from vtprune.kernels.greedy_select import Mode, greedy_select

WEIGHT = 0.3  # what greedy_select takes for mmr


def naive(x: Tensor, k: int, mode: Mode, relevance: Tensor, *, keep: bool) -> Tensor:
    """Returns ``k`` picks from ``x`` ``[N, D]``; ``keep`` says whether all cosines are kept."""
    units = x.float() / x.float().norm(dim=1, keepdim=True)
    cosine = units @ units.T if keep or mode == "max_min" else None
    picks = [0]
    if mode == "max_min" and cosine is not None:
        picks = [int((1 - cosine).topk(2, dim=0, largest=False).values[1].argmax())]
    elif mode in ("mmr", "dpp"):
        picks = [int(relevance.argmax())]
    for _ in range(k - 1):
        index = torch.tensor(picks, device=x.device)
        rows = cosine[index] if keep and cosine is not None else units[index] @ units.T
        if mode == "dpp":
            rows = relevance[index, None] * rows * relevance
            factor = torch.linalg.cholesky(rows[:, index])
            solved = torch.linalg.solve_triangular(factor, rows, upper=False)
            value = relevance.square() - solved.square().sum(0)
        elif mode == "mmr":
            low, high = relevance.aminmax()
            value = (relevance - low) / (high - low) - WEIGHT * rows.max(0).values
        else:
            value = (1 - rows).min(0).values if mode == "max_min" else -rows.sum(0)
        picks.append(int(value.index_fill(0, index, float("-inf")).argmax()))
    return torch.tensor(picks)


def measure(
    calls: dict[str, Callable[[int], Tensor]], counts: Sequence[int], rounds: int, device: Any
) -> dict[tuple[str, int], float]:
    """Returns the fewest milliseconds of each call with each count of picks; they take turns."""
    times: dict[tuple[str, int], list[float]] = {}
    for _ in range(rounds):
        for name, call in calls.items():
            for k in counts:
                began = now(device)
                call(k)
                times.setdefault((name, k), []).append(now(device) - began)
    return {key: min(ms) for key, ms in times.items()}


def now(device: torch.device) -> float:
    """Returns milliseconds, after everything queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1000 * time.perf_counter()


def line(args: argparse.Namespace, mode: Mode, n: int, k: int) -> str:
    """Measures one mode and size; returns a row of the table."""
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, args.width, generator=generator)
    x = x.to(args.device, getattr(torch, args.dtype))
    relevance = (torch.rand(n, generator=generator) * 0.9 + 0.1).to(x.device)
    given: dict[str, Any] = {}
    if mode == "max_sum":
        given["pivot"] = torch.zeros(1, dtype=torch.int64, device=x.device)
    if mode in ("mmr", "dpp"):
        given["relevance"] = relevance[None]
    calls: dict[str, Callable[[int], Tensor]] = {
        "ours": lambda k: greedy_select(x[None], k, mode, **given)[0].cpu(),
        "anew": lambda k: naive(x, k, mode, relevance, keep=False),
        "kept": lambda k: naive(x, k, mode, relevance, keep=True),
    }
    picks = [call(k) for call in calls.values()]
    same = min(float((other == picks[0]).float().mean()) for other in picks)
    ms = measure(calls, (k, 1) if mode == "max_min" else (k,), args.rounds, x.device)
    ours = ms["ours", k]
    cells = [f"{ours:.1f}"]
    cells += [f"{ms[name, k]:.1f} ({ms[name, k] / ours:.1f})" for name in ("anew", "kept")]
    steps = "-"
    if mode == "max_min":
        fast, slow = (ms[name, k] - ms[name, 1] for name in ("ours", "kept"))
        if min(fast, slow) > 0:  # else the first pick varies by more than all others take
            steps = f"{fast:.1f}, {slow:.1f} ({slow / fast:.1f})"
    return f"| {mode} | {n} | {k} | {' | '.join(cells)} | {steps} | {100 * same:.0f} % |"


def conditions(args: argparse.Namespace) -> str:
    """Returns what a figure means nothing without."""
    return "\n".join(
        [
            f"command: {shlex.join(['python', *sys.argv])}",
            f"versions: vtprune {vtprune.__version__}, torch {torch.__version__}, "
            f"Python {platform.python_version()}",
            f"device: {name_of(torch.device(args.device))}",
            f"one image of width {args.width} in {args.dtype}, computed in float32; fastest of "
            f"{args.rounds} interleaved rounds after one of warm-up, ms",
        ]
    )


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--n", type=int, nargs="+", default=[576, 2880, 16384], help="tokens")
    parser.add_argument("--k", type=int, nargs="+", default=[64, 320], help="picks")
    parser.add_argument("--modes", nargs="+", choices=get_args(Mode), default=get_args(Mode))
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if min(args.rounds, args.width, *args.k) < 1 or max(args.k) > min(args.n):
        parser.error("--rounds, --width and --k must be at least 1, and --k at most --n")
    return args


def main() -> None:
    """Measures and prints the table, row by row."""
    args = parse()
    print(conditions(args), end="\n\n")
    print("| mode | N | K | ours | anew (/ ours) | kept (/ ours) | steps: ours, kept | same |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|", flush=True)
    for n in args.n:
        for k in args.k:
            for mode in args.modes:
                print(line(args, mode, n, k), flush=True)


if __name__ == "__main__":
    main()
