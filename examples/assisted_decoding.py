"""Assisted decoding: a model that sees few visual tokens drafts, one that sees all confirms.

The shipped model is the target, and its twin, pruned, the draft; answers are checked to be what the
target says alone. A draft as large as its target saves calls of it, not time: draft with a small
model of its family.

    python examples/assisted_decoding.py --strategy fastervlm --keep 128 64 16 --new-tokens 24
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

import vtprune
from vtprune import assisted
from vtprune.eval import load
from vtprune.eval.samples import MAX_NEW_TOKENS, TASKS, Asker

Batch = dict[str, torch.Tensor]


def row(target: Any, draft: vtprune.Handle, batches: list[Batch], settings: dict[str, Any]) -> str:
    """Returns what the draft was good for in all answers together."""
    runs = [assisted.generate(target, draft, batch, **settings) for batch in batches]
    for batch, done in zip(batches, runs, strict=True):
        alone = target.generate(**batch, **settings)
        if not torch.equal(done.output, alone):
            raise SystemExit(f"The target says {alone.tolist()}, but {done.output.tolist()} here.")
    names = "proposed", "accepted", "target_forwards", "new_tokens"
    proposed, accepted, calls, new = (sum(getattr(done, name) for done in runs) for name in names)
    share = f"{100 * accepted / proposed:5.1f} %" if proposed else "none"
    return f"{share:>8}  {accepted:8}  {proposed:8}  {calls:12}  {new:10}"


def main() -> None:
    """Prints one line per budget of the draft: what was accepted, how often the target ran."""
    parser = argparse.ArgumentParser(description="Drafts with a pruned model.")
    parser.add_argument("--strategy", default="fastervlm", help="of the draft (%(default)s)")
    parser.add_argument("--keep", type=int, nargs="+", default=[256, 128, 64, 16, 4])
    parser.add_argument("--new-tokens", type=int, help="go on after the answer, until so many")
    args = parser.parse_args()
    target, processor = load("mini-llava")
    twin = assisted.twin(target)
    twin.generation_config.num_assistant_tokens = 4  # at first
    twin.generation_config.assistant_confidence_threshold = 0.0
    ask, n = Asker(processor), args.new_tokens
    batches = [ask([s.question], [s.image]) for s in TASKS["scenes"].load(0, 14)]
    settings = {"do_sample": False, "max_new_tokens": n or MAX_NEW_TOKENS, "min_new_tokens": n}
    print("visual tokens     share  accepted  proposed  target calls  new tokens")
    for keep in args.keep:
        with vtprune.wrap(twin, args.strategy, keep=keep, processor=processor) as draft:
            print(f"{keep:13}  {row(target, draft, batches, settings)}")


if __name__ == "__main__":
    main()
