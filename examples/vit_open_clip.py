"""open_clip: fewer tokens in the image tower of a CLIP; its text tower keeps all words.

The whole model is wrapped, and ``encode_image`` returns as many features as before. Without
``--model`` it is the pair of towers that is shipped with vtprune, on held-out pictures, each of
which has to find its caption among those of all. With a name of open_clip's, such as ViT-B-32, the
weights are random and only operations and times are told.

    python examples/vit_open_clip.py --strategy tome --keep 0.25
    python examples/vit_open_clip.py --model ViT-B-16 --strategy strided --keep 49
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import open_clip
import torch
from _vit import command_line, pace, parse, run, told

import vtprune
from vtprune.eval import load, mini_clip
from vtprune.eval.scene_captions import make_pair


def chosen(args: argparse.Namespace) -> tuple[Any, torch.Tensor, torch.Tensor | None]:
    """Returns the model, pixels, and the ids of captions (None for random weights)."""
    if args.model is not None:
        model: Any = open_clip.create_model(args.model).eval()
        return model, torch.randn(args.batch, 3, *model.visual.image_size), None
    pairs = [make_pair(i) for i in range(args.batch)]
    model, inputs = load(mini_clip.NAME)
    pixels = inputs.images([pair.picture.image for pair in pairs])
    return model, pixels, inputs.captions([pair.caption for pair in pairs])


@torch.inference_mode()
def main() -> None:
    """Prints what is found, operations and images per second, with all tokens and with fewer."""
    args = parse(command_line(__doc__, strategy="tome"))
    model, pixels, ids = chosen(args)
    call = partial(model.encode_image, pixels, normalize=True)
    before, whole = call(), pace(call, len(pixels), args.repeats)
    with vtprune.wrap(model, args.strategy, keep=args.keep) as handle:
        after, fewer = call(), pace(call, len(pixels), args.repeats)
        told(handle, whole, fewer)
    print(
        f"cosine of features with all tokens and with fewer: {(before * after).sum(-1).mean():.3f}"
    )
    if ids is not None:
        texts, own = model.encode_text(ids, normalize=True), torch.arange(len(ids))
        for label, images in (("unpruned", before), (args.strategy, after)):
            n = int(((images @ texts.T).argmax(-1) == own).sum())
            print(f"{label}: {n} of {len(own)} pictures find their caption")


if __name__ == "__main__":
    run(main)
