"""Random prompts against the full-length model that hides what was dropped.

    python -m tests.fuzz_oracle --n 2000

Drawn at random: family, rows, images and videos with their sizes, text, padding, strategies,
budgets, position ids, newlines. Every case is a function of the seed and its number.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import vtprune
from tests.contracts.bank import NEEDS_FRAMES, NEEDS_MAPS
from tests.families import prompts
from tests.families.oracles import gather_is_mask, model_of
from vtprune.errors import UnsupportedError
from vtprune.eval import tiny
from vtprune.registry import keeping_names, strategy_class

STEPS = 4
WORDS = ("what", "is", "in", "the", "picture", "how", "many", "red", "shapes", "please", "describe")


@dataclass(frozen=True)
class Case:
    """One random call; ``repr`` says all that is needed to repeat it."""

    seed: int
    number: int
    family: str
    strategy: list[str]
    keep: list[int | float]
    options: dict[str, Any]
    rows: list[list[tuple[str, int, int]]]

    def inputs(self) -> dict[str, Tensor]:
        rng = random.Random(f"{self.seed} {self.number} words")
        conversations = []
        for row in self.rows:
            parts: list[Any] = [_words(rng)]
            for i, (kind, width, height) in enumerate(row):
                make = prompts.image if kind == "image" else prompts.video
                parts += [make(100 * self.number + i, width, height), _words(rng)]
            conversations.append(prompts.user(*parts))
        processor = model_of(self.family)[1]
        inputs = prompts.encode(processor, conversations)
        inputs.pop("labels", None)
        return inputs


def _words(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(1, 12)))


def draw(seed: int, number: int) -> Case:
    """Returns case ``number``."""
    rng = random.Random(f"{seed} {number}")
    family = rng.choice(tiny.names())
    refused = NEEDS_MAPS if family in prompts.VIDEOS else NEEDS_MAPS | NEEDS_FRAMES
    names = [name for name in keeping_names() if name not in refused]
    outside = [n for n in names if not strategy_class(n).acts_inside]
    strategy = [rng.choice(names)]
    if strategy[0] in outside and rng.random() < 0.3:
        strategy.append("fastv")
    keep: list[int | float] = []
    for name in strategy:
        inside, staged = strategy_class(name).acts_inside, strategy_class(name).kind == "adaptive"
        share = rng.uniform(0.5 if inside else 0.1, 1.0)
        # So few tokens are out of reach where the first layers get all.
        few = rng.random() < 0.3 and not (inside and staged)
        keep.append(rng.randint(1, 9) if few else share)
    options: dict[str, Any] = {}
    if rng.random() < 0.4 and "qwen" not in family:
        options["positions"] = rng.choice(["keep", "renumber"])
    if rng.random() < 0.5 and family in ("llava_next", "llava_next_video", "llava_onevision"):
        options["newlines"] = rng.choice(["keep", "row"])
    return Case(seed, number, family, strategy, keep, options, _rows(rng, family))


def _rows(rng: random.Random, family: str) -> list[list[tuple[str, int, int]]]:
    """Per row of the batch its images and videos with width and height; one row has some."""
    kinds = prompts.kinds(family)
    both = "video_and_image" in kinds
    modes = ["image"] * 3 + (["video"] if "video" in kinds else []) + (["any"] if both else [])
    mode = rng.choice(modes)
    n_rows = 1 if mode != "image" and family == "smolvlm" else rng.randint(1, 3)
    first = rng.randrange(n_rows)
    rows = []
    for row in range(n_rows):
        most = 2 if mode == "image" else 1
        least = 1 if row == first or family in ("paligemma", "video_llava") else 0
        things = []
        for _ in range(rng.randint(least, most if family != "paligemma" else 1)):
            kind = rng.choice(["image", "video"]) if mode == "any" else mode
            small = kind == "video"
            size = (56, 40) if small else (rng.randint(30, 120), rng.randint(30, 120))
            things.append((kind, *size))
        rows.append(things)
    return rows


@torch.no_grad()
def run(case: Case) -> str:
    """Returns ``equal`` or ``refused``; raises AssertionError for anything else."""
    given = {"strategy": case.strategy, "keep": case.keep, **case.options}
    given["processor"] = model_of(case.family)[1]
    try:
        gather_is_mask(case.family, case.inputs(), given, steps=STEPS)
    except (UnsupportedError, vtprune.ConfigError):
        return "refused"
    except AssertionError as error:
        raise AssertionError(case) from error
    return "equal"


def outcomes(n: int, seed: int) -> Iterator[tuple[Case, str]]:
    """Runs the cases 0 to ``n - 1``."""
    for number in range(n):
        case = draw(seed, number)
        yield case, run(case)


def main() -> None:
    """Runs the cases and prints how many there were of each family and outcome."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="number of the one case to run")
    args = parser.parse_args()
    if args.only is not None:
        case = draw(args.seed, args.only)
        sys.exit(f"{case}: {run(case)}")
    count: Counter[tuple[str, str]] = Counter()
    for i, (case, outcome) in enumerate(outcomes(args.n, args.seed)):
        count[case.family, outcome] += 1
        if i % 100 == 99:
            print(f"{i + 1} cases", flush=True)
    for (family, outcome), n in sorted(count.items()):
        print(f"{family:20} {outcome:8} {n:5}")
    equal = sum(n for (_, outcome), n in count.items() if outcome == "equal")
    print(f"{args.n} cases of seed {args.seed}: {equal} equal the mask oracle, none differ")


if __name__ == "__main__":
    main()
