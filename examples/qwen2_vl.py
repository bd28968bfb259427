"""Qwen2-VL: the number of visual tokens follows the image, one for 28 x 28 pixels.

So a share is the natural budget, and there is a rival that needs no strategy: a smaller image. It
is measured too, and it saves time in the tower as well, which pruning cannot; pruning must win by
its answers. Position ids have three axes (time, height, width: M-RoPE). Survivors keep theirs, so
that the model still knows where in the image each token was; ``positions="renumber"`` is refused.
The tower has no [CLS]; ``divprune`` needs none.

    python examples/qwen2_vl.py photo.jpg "What does the sign say?" --keep 0.25
    python examples/qwen2_vl.py --tiny
"""

from __future__ import annotations

from _common import ask, command_line, load, measure, parse, picture, run, show

import vtprune

MODEL = "Qwen/Qwen2-VL-2B-Instruct"


def main() -> None:
    """Prints answers and costs unpruned, pruned, and with about as few tokens by resizing."""
    args = parse(command_line(__doc__, model=MODEL, strategy="divprune", keep="0.25"))
    image = picture(args)
    model, processor = load(args, "qwen2_vl")
    batch = ask(model, processor, image, args.question)

    before = measure("unpruned", model, processor, batch, args)
    with vtprune.wrap(model, args.strategy, keep=args.keep) as handle:
        after = measure(args.strategy, model, processor, batch, args, handle)
        kept = handle.selections[0].slots[0].tolist()

    images = processor.image_processor  # 2 x 2 patches make a token
    _, rows, cols = (batch["image_grid_thw"][0] // images.merge_size).tolist()
    side = images.merge_size * images.patch_size * (len(kept) / (rows * cols)) ** 0.5
    resized = image.resize((max(28, round(cols * side)), max(28, round(rows * side))))
    small = ask(model, processor, resized, args.question)
    show(args, model, before, after, measure("smaller image", model, processor, small, args))

    places = ", ".join(str(divmod(token, cols)) for token in kept[:6])
    print(f"{rows} x {cols} tokens; rows and columns of the first survivors: {places}")


if __name__ == "__main__":
    run(main)
