"""Which things of a scene a strategy keeps, and what the shipped model counts from what is kept.

The first table follows a strategy: how many of the kept tokens lie on things, how much of a thing
is kept, and how often hardly any of it is (less than a fifth of its patches). The second follows
the model: the same number of tokens is kept, drawn at random, but a given share of them on things.
Scenes say where their things are; only this script reads that.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

import vtprune
from vtprune.eval.samples import MAX_NEW_TOKENS, Asker, Sample, find_tasks
from vtprune.eval.scene_things import CELL, SIZE, numbers
from vtprune.eval.scenes import make_scene
from vtprune.eval.shipped import load
from vtprune.types import Signals, Strategy

STRATEGIES = ("random", "fastervlm", "vtc_cls", "hiprune", "flowcut", "todre")
SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8)
SIDE = 16  # visual tokens in a row of a scene
BATCH = 20


@dataclass(frozen=True)
class OnThings(Strategy):
    """Draws ``share`` of the kept tokens from those ``on`` things ``[B, N]``, where there are."""

    keep: int
    share: float
    on: Tensor = field(compare=False)

    def score(self, signals: Signals) -> Tensor:
        draw = torch.rand(len(self.on), signals.n, generator=torch.Generator().manual_seed(0))
        score = draw.clone()
        for row, on in zip(score, self.on, strict=True):
            wanted = min(round(self.share * self.keep), int(on.sum()))
            for places, count in ((on, wanted), (~on, self.keep - wanted)):
                spots = places.nonzero()[:, 0]
                row[spots[row[spots].argsort(descending=True)[:count]]] += 1
        return score


def things(sample: Sample) -> dict[str, list[Tensor]]:
    """Returns the tokens ``[N]`` bool of every thing in a scene, by what it is."""
    found = make_scene(sample.index).things
    written = {thing for run in numbers(found) for thing in run}
    step, masks = SIZE // SIDE, dict[str, list[Tensor]]()
    for thing in found:
        mask = torch.zeros(SIDE, SIDE, dtype=torch.bool)
        rows, columns = (
            slice(at // step, (at + CELL - 1) // step + 1) for at in (thing.y, thing.x)
        )
        mask[rows, columns] = True
        kind = "of a number" if thing in written else "digit" if thing.is_digit else "shape"
        masks.setdefault(kind, []).append(mask.flatten())
    return masks


def covered(samples: Sequence[Sample]) -> Tensor:
    """Returns the tokens on things, ``[B, N]`` bool."""
    return torch.stack(
        [torch.stack([m for ms in things(s).values() for m in ms]).any(0) for s in samples]
    )


def batches(task: str, limit: int, ask: Asker) -> Iterator[tuple[list[Sample], dict[str, Tensor]]]:
    """Yields held-out samples and the model's inputs for them."""
    (found,) = find_tasks((task,))
    for first in range(0, limit, BATCH):
        samples = found.load(first, min(first + BATCH, limit))
        yield samples, ask([s.question for s in samples], [s.image for s in samples])


def coverage(model: Any, ask: Asker, strategy: str, keep: int, limit: int) -> str:
    """Returns a row of the first table."""
    on_things: list[float] = []
    kept_of: dict[str, list[float]] = {}
    for samples, inputs in batches("scenes", limit, ask):
        with vtprune.wrap(model, strategy, keep=keep, processor=ask.processor) as handle:
            ask.answers(model, inputs, 1)
            chosen = [selection.slots[0] for selection in handle.selections]
        for sample, kept in zip(samples, chosen, strict=True):
            on_things.append(float(covered([sample])[0, kept].float().mean()))
            for kind, masks in things(sample).items():
                shares = [float(mask[kept].sum() / mask.sum()) for mask in masks]
                kept_of.setdefault(kind, []).extend(shares)
    cells = [f"{100 * statistics.fmean(on_things):.0f}"]
    for kind in ("digit", "of a number", "shape"):
        lost = statistics.fmean(share < 0.2 for share in kept_of[kind])
        cells.append(f"{100 * statistics.fmean(kept_of[kind]):.0f} ({100 * lost:.0f})")
    return f"| `{strategy}` | {' | '.join(cells)} |"


def counting(model: Any, ask: Asker, share: float | None, keep: int, limit: int) -> str:
    """Returns a row of the second table; ``share`` None keeps everything."""
    said: list[tuple[str, str]] = []
    for samples, inputs in batches("scenes-count", limit, ask):
        n = SIDE**2 if share is None else keep
        with vtprune.wrap(model, OnThings(n, share or 0.0, covered(samples)), keep=n):
            answers = ask.answers(model, inputs, MAX_NEW_TOKENS)
        said += [(a, s.expected) for a, s in zip(answers, samples, strict=True)]
    counted = statistics.fmean(int(answer) for answer, _ in said if answer.isdigit())
    true = statistics.fmean(int(expected) for _, expected in said)
    right = statistics.fmean(answer == expected for answer, expected in said)
    label = "all tokens" if share is None else f"{100 * share:.0f} %"
    return f"| {label} | {counted:.2f} | {true:.2f} | {100 * right:.1f} |"


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="mini-llava", help="a shipped model")
    parser.add_argument("--keep", type=int, default=64, help=f"tokens of {SIDE**2}")
    parser.add_argument("--limit", type=int, default=200, help="scenes")
    parser.add_argument("--strategy", nargs="+", default=STRATEGIES)
    args = parser.parse_args()
    logging.disable_progress_bar()
    model, processor = load(args.model, "cpu", "float32")
    ask = Asker(processor, "")
    print(f"{shlex.join(['python', *sys.argv])}\n")
    print("| strategy | kept on things, % | digit, % (lost) | of a number | shape |")
    print("|---|---:|---:|---:|---:|")
    for name in args.strategy:
        print(coverage(model, ask, name, args.keep, args.limit), flush=True)
    print("\n| kept on things | counted | true | right, % |\n|---|---:|---:|---:|")
    for share in (None, *SHARES):
        print(counting(model, ask, share, args.keep, args.limit), flush=True)


if __name__ == "__main__":
    main()
