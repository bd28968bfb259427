"""timm: fewer tokens in a classifier, block by block; the model is used as before.

``tome`` merges in every block the patches whose keys are most alike. ``--keep`` says how many are
left in the end; a ViT takes ``reduce=8`` as well: eight fewer in every block. Without ``--model``
it is the classifier that is shipped with vtprune, on its own held-out pictures: 112 classes, 196
patches. With a name of timm's, such as deit_small_patch16_224, the weights are random and only
operations and times are told.

    python examples/vit_timm.py --strategy tome --keep 0.25
    python examples/vit_timm.py --model vit_base_patch16_clip_224 --strategy strided --keep 49
"""

from __future__ import annotations

import argparse
from typing import Any

import timm
import torch
from _vit import command_line, pace, parse, run, told

import vtprune
from vtprune.eval import load, mini_vit
from vtprune.eval.scene_objects import CLASSES, make_picture


def chosen(args: argparse.Namespace) -> tuple[Any, torch.Tensor, list[str]]:
    """Returns the model, a batch of pixels, and what is right (nothing for random weights)."""
    if args.model is not None:
        model: Any = timm.create_model(args.model).eval()
        size = model.pretrained_cfg["input_size"]
        return model, torch.randn(args.batch, *size), []
    pictures = [make_picture(i) for i in range(args.batch)]
    model, inputs = load(mini_vit.NAME)
    pixels = inputs.images([picture.image for picture in pictures])
    return model, pixels, [CLASSES[picture.label] for picture in pictures]


@torch.inference_mode()
def main() -> None:
    """Prints what is right, operations and images per second, with all tokens and with fewer."""
    args = parse(command_line(__doc__, strategy="tome"))
    model, pixels, right = chosen(args)
    before, whole = model(pixels), pace(lambda: model(pixels), len(pixels), args.repeats)
    with vtprune.wrap(model, args.strategy, keep=args.keep) as handle:
        after = model(pixels)
        fewer = pace(lambda: model(pixels), len(pixels), args.repeats)
        told(handle, whole, fewer)
    for label, logits in (("unpruned", before), (args.strategy, after)):
        given = [CLASSES[i] for i in logits.argmax(-1).tolist()] if right else []
        n = sum(a == b for a, b in zip(given, right, strict=True))
        print(f"{label}: {n} of {len(right)} right" if right else f"{label}: {list(logits.shape)}")


if __name__ == "__main__":
    run(main)
