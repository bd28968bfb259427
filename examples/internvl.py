"""InternVL 3: square tiles of 256 tokens and a thumbnail; the budget is that of each tile.

To the model every tile is an image of its own, and so it is to ``--keep``: 64 means 64 of each
tile. ``--total`` shares a number for the whole image equally instead. The tower has a [CLS] token,
and 2 x 2 patches are shuffled into one visual token, which gets the mean of their attention.
The report has a line per tile; the last one is the thumbnail, the whole image made small.

    python examples/internvl.py photo.jpg "What does the sign say?" --total 512
    python examples/internvl.py --tiny
"""

from __future__ import annotations

from _common import ask, command_line, load, measure, parse, picture, run, show

import vtprune

MODEL = "OpenGVLab/InternVL3-1B-hf"


def main() -> None:
    """Prints the answers with and without pruning, their costs, and what all tiles kept."""
    parser = command_line(__doc__, model=MODEL, strategy="fastervlm", keep="0.25")
    parser.add_argument("--total", type=int, help="visual tokens of the whole image, for --keep")
    args = parse(parser)
    image = picture(args)
    model, processor = load(args, "internvl")
    batch = ask(model, processor, image, args.question)
    n_tiles = len(batch["pixel_values"])
    if args.total is not None:
        args.keep = max(1, args.total // n_tiles)

    before = measure("unpruned", model, processor, batch, args)
    with vtprune.wrap(model, args.strategy, keep=args.keep) as handle:
        after = measure(args.strategy, model, processor, batch, args, handle)
    show(args, model, before, after)

    tokens = sum(tile.tokens for tile in after.report.images)
    kept = sum(tile.kept for tile in after.report.images)
    print(f"{n_tiles} tiles together: {kept} of {tokens} visual tokens")


if __name__ == "__main__":
    run(main)
