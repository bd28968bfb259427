"""LLaVA-1.5: as many visual tokens as the tower has patches, 576 for every image.

So ``--keep`` may well be a count: 144 of 576 is the same for every image. The tower is a CLIP with
a [CLS] token, which attends to what matters; ``fastervlm`` keeps the patches it attends to in the
block whose output the projector gets (the last but one). The map shows which ones stay.

    python examples/llava.py photo.jpg "What is the man holding?" --keep 144
    python examples/llava.py --tiny       # offline, on a small model that was trained to answer
"""

from __future__ import annotations

import argparse
import math

from _common import ask, command_line, load, measure, parse, picture, run, show
from PIL import Image

import vtprune
from vtprune.eval import scenes


def trained(args: argparse.Namespace) -> Image.Image:
    """Chooses the model that is shipped with vtprune; returns a scene of the kind it knows."""
    scene = scenes.make_scene(seed=3, split="test")
    asked = scenes.pick_question(scene, seed=0)
    args.tiny, args.model, args.new_tokens = False, "mini-llava", 5
    args.question = asked.text
    return scene.image


def main() -> None:
    """Prints the answers with and without pruning, what each cost, and a map of what stayed."""
    args = parse(
        command_line(__doc__, model="llava-hf/llava-1.5-7b-hf", strategy="fastervlm", keep="0.25")
    )
    image = trained(args) if args.tiny and args.path is None else picture(args)
    model, processor = load(args, "llava")
    batch = ask(model, processor, image, args.question)

    before = measure("unpruned", model, processor, batch, args)
    with vtprune.wrap(model, args.strategy, keep=args.keep) as handle:
        after = measure(args.strategy, model, processor, batch, args, handle)
        kept = handle.selections[0].slots[0].tolist()
    show(args, model, before, after)

    side = math.isqrt(after.report.images[0].tokens)
    for row in range(side):
        print("".join("#" if row * side + col in kept else "." for col in range(side)))


if __name__ == "__main__":
    run(main)
