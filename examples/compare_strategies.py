"""Compare strategies on a few images: who still answers right with 32 of 256 visual tokens?

Runs offline on the model that is shipped with the package (extra: vtprune[eval]). For intervals,
more budgets and a plot use the command line: vtprune sweep.
"""

from __future__ import annotations

import argparse
from typing import Any

import vtprune
from vtprune.eval import load
from vtprune.eval.samples import MAX_NEW_TOKENS, TASKS, Asker, Sample


def answers(model: Any, ask: Asker, samples: list[Sample]) -> list[str]:
    """Returns the model's answers to all samples, in one batch."""
    batch = ask([s.question for s in samples], [s.image for s in samples])
    return ask.answers(model, batch, MAX_NEW_TOKENS)


def right(given: list[str], expected: list[str]) -> int:
    """Counts the right answers."""
    return sum(a == b for a, b in zip(given, expected, strict=True))


def main() -> None:
    """Prints one line per strategy: right answers, and the questions it lost."""
    parser = argparse.ArgumentParser(description="Compares strategies on a few scenes.")
    parser.add_argument("--strategies", nargs="+", default=["random", "fastervlm", "divprune"])
    parser.add_argument("--keep", type=int, default=32, help="visual tokens per image")
    parser.add_argument("--scenes", type=int, default=28)
    args = parser.parse_args()

    model, processor = load("mini-llava")
    ask = Asker(processor)
    samples = TASKS["scenes"].load(0, args.scenes)

    expected = [sample.expected for sample in samples]
    whole = answers(model, ask, samples)
    print(f"unpruned: {right(whole, expected)} of {len(samples)}")
    for name in args.strategies:
        with vtprune.wrap(model, name, keep=args.keep, processor=processor) as handle:
            pruned = answers(model, ask, samples)
            kept = handle.report().images[0]
        n = right(pruned, expected)
        print(f"{name}, {kept.kept} of {kept.tokens} tokens: {n} of {len(samples)}")
        for sample, before, after in zip(samples, whole, pruned, strict=True):
            if before == sample.expected != after:
                print(f"    {sample.question} {before} -> {after or '(nothing)'}")


if __name__ == "__main__":
    main()
