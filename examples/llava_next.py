"""LLaVA-NeXT (llava-v1.6): the image whole and in tiles, each row of the tiles ended by a newline.

The tokens of a large image are one base view of 576, then the tiles, stitched to one grid, cropped
to the image, with a newline token after every row. Newlines are made of no patch: no strategy
chooses them and no budget counts them. With ``newlines="keep"``, the authors' way, all stay. With
``"row"`` one leaves together with the last visual token of its row, so nothing ends an empty row.
Towers are CLIP with [CLS]; ``fastervlm`` compares patches of all tiles with one another.

    python examples/llava_next.py photo.jpg "What does the sign say?" --keep 0.1
    python examples/llava_next.py --tiny
"""

from __future__ import annotations

from _common import ask, command_line, load, measure, parse, picture, run, show

import vtprune

MODEL = "llava-hf/llava-v1.6-vicuna-7b-hf"


def main() -> None:
    """Prints answers and costs unpruned, and pruned with either fate of the newlines."""
    args = parse(command_line(__doc__, model=MODEL, strategy="fastervlm", keep="0.1"))
    image = picture(args)
    model, processor = load(args, "llava_next")
    batch = ask(model, processor, image, args.question)

    before = measure("unpruned", model, processor, batch, args)
    with vtprune.wrap(model, args.strategy, keep=args.keep, newlines="keep") as handle:
        keep = measure(f"{args.strategy}, newlines keep", model, processor, batch, args, handle)
    with vtprune.wrap(model, args.strategy, keep=args.keep, newlines="row") as handle:
        row = measure(f"{args.strategy}, newlines row", model, processor, batch, args, handle)
    show(args, model, before, keep, row)

    gone = keep.report.images[0].kept - row.report.images[0].kept
    print(f"{gone} newlines left with their rows.")


if __name__ == "__main__":
    run(main)
