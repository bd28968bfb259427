"""Sweeps of several processes, killed at random moments and resumed, against one of one process.

Each round starts a sweep of two ranks under torchrun's agent, kills one of them, or both and the
agent, with SIGKILL, and runs the same command again, by as many processes or by one, until it ends
well. Its ``results.jsonl`` must then have the bytes of an uninterrupted sweep of one process, its
``timings.jsonl`` the same batches, and nothing else must be left. Moments are drawn by what is
done, not by the clock, so that a busy machine changes nothing: some while models are loaded, most
between the first batch and the last, some while the ranks' files are put together. All processes
are forked from this one, which saves them the imports; so Linux only.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import random
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from uuid import uuid4

import psutil
import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import vtprune
from vtprune.eval.cli import app

SWEEP = ["--strategy", "random,visionzip", "--keep", "25%,4"]
RESULTS, TIMINGS = "results.jsonl", "timings.jsonl"
VICTIMS = ("rank 0", "rank 1", "all")
LOADING, MERGING = "loading", "merging"  # other moments are numbers of measured batches
ATTEMPTS = 5


@dataclass(frozen=True)
class Kill:
    """Who is killed, when, and how many processes resume; ``delay`` in seconds."""

    victim: str
    moment: str | int
    delay: float
    resumed_by: int


def sweep(words: list[str]) -> None:
    """Runs the command line, in one process or as one rank."""
    torch.set_num_threads(1)  # one process would have more of them than a rank
    sys.exit(app(words, prog_name="vtprune", standalone_mode=False))


def launch(words: list[str]) -> None:
    """Runs it in two ranks, as torchrun does."""
    config = LaunchConfig(
        *(1, 1, 2),
        run_id=uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        start_method="fork",
    )
    elastic_launch(config, rank)(words)


def rank(words: list[str]) -> None:
    """Runs it as one rank; a rank that ends well has to return."""
    try:
        sweep(words)
    except SystemExit as end:
        if end.code:
            raise


def start(args: argparse.Namespace, out: Path, processes: int) -> BaseProcess:
    """Starts the sweep; what it says goes to a file beside its folder."""
    words = ["sweep", "--model", args.model, "--limit", str(args.limit), "--batch-size"]
    words += [str(args.batch_size), "--out", str(out), *SWEEP]
    target = sweep if processes == 1 else launch
    started = multiprocessing.get_context("fork").Process(
        target=said, args=(target, words, out.with_suffix(".txt"))
    )
    started.start()
    return started


def said(target: Callable[[list[str]], None], words: list[str], file: Path) -> None:
    """Calls ``target`` with its output in a file."""
    with file.open("ab") as there:
        for stream in (1, 2):
            os.dup2(there.fileno(), stream)
    target(words)


def rows(out: Path, name: str) -> int:
    """Returns the whole rows in a file of the folder and in those of its ranks."""
    paths = out.glob(f"{Path(name).stem}*.jsonl")
    try:
        return sum(path.read_bytes().count(b"\n") for path in paths)
    except FileNotFoundError:  # just put together
        return rows(out, name)


def ranks(agent: BaseProcess) -> dict[str, psutil.Process]:
    """Returns the processes that the agent has started, by rank."""
    try:
        found = psutil.Process(agent.pid).children()
    except psutil.Error:  # it has ended
        return {}
    started = sorted(found, key=lambda process: process.pid)
    return {f"rank {i}": process for i, process in enumerate(started)}


def kill(agent: BaseProcess, out: Path, plan: Kill, total: int) -> bool:
    """Kills when the moment has come; returns whether it came before the end."""
    wanted = {LOADING: 0, MERGING: total}.get(str(plan.moment), plan.moment)
    known = ranks(agent)
    while agent.is_alive() and len(known) < 2:
        time.sleep(0.05)
        known = ranks(agent)
    while agent.is_alive() and rows(out, TIMINGS) < int(wanted):
        time.sleep(0.005)
    time.sleep(plan.delay)
    if plan.victim == "all":
        agent.kill()
    victims = [known[name] for name in known if plan.victim in ("all", name)]
    running = [process for process in victims if hit(process)]
    psutil.wait_procs(running)
    agent.join()  # it ends the other rank
    return bool(running)


def hit(process: psutil.Process) -> bool:
    """Kills a process; returns whether there was one."""
    try:
        running = process.status() != psutil.STATUS_ZOMBIE
        process.kill()
    except psutil.Error:
        return False
    return running


def draw(random_: random.Random, total: int, seconds: float) -> Kill:
    """Draws a kill; ``seconds`` is how long one process took from its first batch to its last."""
    share, victim = random_.random(), random_.choice(VICTIMS)
    if share < 0.1:
        moment, delay = LOADING, random_.uniform(0, 2 * seconds)
    elif share < 0.35:  # when the other rank may have ended
        moment, delay = MERGING, random_.uniform(0, 0.15)
        victim = random_.choice(("rank 0", "all"))
    else:
        moment, delay = random_.randrange(1, total), random_.uniform(0, 2 * seconds / total)
    return Kill(victim, moment, delay, random_.choice((1, 2)))


def problems(out: Path, whole: Path) -> list[str]:
    """Returns what is not as in the folder of the uninterrupted sweep."""
    found = []
    if (out / RESULTS).read_bytes() != (whole / RESULTS).read_bytes():
        found.append(f"{RESULTS} differs")
    marks = [
        [tuple(json.loads(line).values())[:-1] for line in (path / TIMINGS).open()]  # but the time
        for path in (out, whole)
    ]
    if marks[0] != marks[1]:
        found.append(f"{TIMINGS} has other batches")
    left = {path.name for path in out.iterdir()} - {path.name for path in whole.iterdir()}
    return [*found, *sorted(name for name in left if not name.startswith(".lock"))]


def finish(args: argparse.Namespace, out: Path, processes: int) -> None:
    """Runs the sweep to its end.

    Raises:
        SystemExit: it fails again and again.
    """
    for _ in range(ATTEMPTS):
        started = start(args, out, processes)
        started.join()
        if started.exitcode == 0:
            return
    sys.exit(f"It does not end well:\n{out.with_suffix('.txt').read_text()}")


def one_round(args: argparse.Namespace, number: int, base: Path, seconds: float) -> list[str]:
    """Kills and resumes once; returns the problems."""
    random_, total = random.Random(f"{args.seed} {number}"), rows(base / "whole", TIMINGS)
    for attempt in range(ATTEMPTS):  # until a kill has come in time
        plan, out = draw(random_, total, seconds), base / f"killed-{number}-{attempt}"
        if kill(start(args, out, 2), out, plan, total):
            break
    else:
        sys.exit(f"No kill came in time in {ATTEMPTS} attempts.")
    at = [rows(out, name) for name in (RESULTS, TIMINGS)]
    parts = sorted(path.name for path in out.glob("results.rank-*.jsonl"))
    finish(args, out, plan.resumed_by)
    found = problems(out, base / "whole")
    whole = rows(base / "whole", RESULTS)
    print(
        f"| {number} | {plan.victim} | {plan.moment} | {at[0]} of {whole} | {len(parts)} "
        f"| {plan.resumed_by} | {'; '.join(found) or 'identical'} |",
        flush=True,
    )
    return found


def conditions(args: argparse.Namespace) -> str:
    """Returns what has to be known beside the table."""
    said = (
        f"command: {shlex.join(['python', *sys.argv])}",
        f"versions: vtprune {vtprune.__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}",
        f"sweep: {shlex.join(SWEEP)} on {args.limit} samples in batches of {args.batch_size}",
    )
    return "\n".join(said)


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--model", default="mini-llava")
    parser.add_argument("--limit", type=int, default=24, help="samples")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    if min(args.rounds, args.limit, args.batch_size) < 1:
        parser.error("--rounds, --limit and --batch-size must be at least 1")
    return args


def main() -> None:
    """Prints a row per round; fails when one is not identical."""
    args = parse()
    print(conditions(args), end="\n\n")
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        finish(args, base / "whole", 1)
        marks = [json.loads(line) for line in (base / "whole" / TIMINGS).open()]
        seconds = sum(mark["ms"] for mark in marks) / 1000
        print("| round | killed | after batches | answers then | parts | resumed by | results |")
        print("|--:|---|---|--:|--:|--:|---|", flush=True)
        bad = [n for n in range(args.rounds) if one_round(args, n, base, seconds)]
    print(f"\n{args.rounds - len(bad)} of {args.rounds} byte-identical")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
