"""Qwen2.5-VL: most blocks of the tower attend within windows, so only a few can be read.

Attention in a window of 8 x 8 patches compares a patch with its neighbours alone and says nothing
about the image as a whole. Strategies that read attention take the last block with full attention
up to the one they want (blocks 7, 15, 23 and 31 of 32); ``--layer`` names another, and a block with
windows is refused. The tokens wait in the order of the windows until the tower is done; values of
patches are put in the order of the image before anything is chosen. All else is as in Qwen2-VL:
tokens follow the resolution, and survivors keep their M-RoPE ids.

    python examples/qwen2_5_vl.py photo.jpg "What does the sign say?" --layer 23
    python examples/qwen2_5_vl.py --tiny
"""

from __future__ import annotations

from _common import ask, command_line, load, measure, parse, picture, run, show

import vtprune

MODEL = "Qwen/Qwen2.5-VL-3B-Instruct"


def main() -> None:
    """Prints the answers with and without pruning, their costs, and the blocks that were read."""
    parser = command_line(__doc__, model=MODEL, strategy="visionzip", keep="0.25")
    parser.add_argument("--layer", type=int, help="block of the tower to read, from 0")
    args = parse(parser)
    image = picture(args)
    model, processor = load(args, "qwen2_5_vl")
    batch = ask(model, processor, image, args.question)

    before = measure("unpruned", model, processor, batch, args)
    layers = None if args.layer is None else [args.layer]
    with vtprune.wrap(model, args.strategy, keep=args.keep, layers=layers) as handle:
        after = measure(args.strategy, model, processor, batch, args, handle)
    show(args, model, before, after)

    vision = model.config.vision_config
    print(f"full attention in blocks {vision.fullatt_block_indexes} of {vision.depth}")
    print(f"read: {list(after.report.layers) or 'none'}")


if __name__ == "__main__":
    run(main)
