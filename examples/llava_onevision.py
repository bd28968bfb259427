"""LLaVA-OneVision: a base view and up to 36 tiles, shrunk to the area of 9.

A large image gives 729 tokens of the base view and about 9 times as many of its tiles, so there
is much to drop. Two things differ from LLaVA-NeXT. The tower is a SigLIP without [CLS]: strategies
that read it (``fastervlm``, ``visionzip``) take the attention that each patch receives instead, and
``divprune`` needs no attention at all. And where the tiles were shrunk, a token is made of several
patches, so values of patches are carried to tokens by the model's own interpolation.
The budget is one for the whole image; what it left of the base view and of the tiles is printed.

    python examples/llava_onevision.py photo.jpg "What does the sign say?" --keep 729
    python examples/llava_onevision.py --tiny
"""

from __future__ import annotations

from _common import ask, command_line, load, measure, parse, picture, run, show

import vtprune

MODEL = "llava-hf/llava-onevision-qwen2-0.5b-ov-hf"


def main() -> None:
    """Prints the answers with and without pruning, their costs, and where tokens stayed."""
    args = parse(command_line(__doc__, model=MODEL, strategy="divprune", keep="0.25"))
    image = picture(args)
    model, processor = load(args, "llava_onevision")
    batch = ask(model, processor, image, args.question)

    before = measure("unpruned", model, processor, batch, args)
    with vtprune.wrap(model, args.strategy, keep=args.keep, newlines="row") as handle:
        after = measure(args.strategy, model, processor, batch, args, handle)
        kept = handle.selections[0].slots[0]
    show(args, model, before, after)

    vision = model.config.vision_config
    n_base = (vision.image_size // vision.patch_size) ** 2  # the base view comes first
    of_base, n = int((kept < n_base).sum()), after.report.images[0].tokens
    print(f"base view: {of_base} of {n_base} tokens stayed")
    print(f"tiles, with newlines: {len(kept) - of_base} of {n - n_base} tokens stayed")


if __name__ == "__main__":
    run(main)
