"""One picture seen by a shipped ViT: what it says of it with all tokens and with fewer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from vtprune.engine.plan import wrap
from vtprune.errors import ConfigError
from vtprune.eval.regions import regions_of
from vtprune.eval.samples_vit import load_objects, load_pairs
from vtprune.eval.scene_objects import CLASSES
from vtprune.eval.shipped_vit import Inputs
from vtprune.types import Keep, Selection


@dataclass(frozen=True)
class Seen:
    """What is said with fewer tokens, and with the ``whole`` picture.

    ``seen`` is the picture as the tower gets it, ``[H, W, 3]`` in 0 to 1; ``regions`` are as of
    ``regions_of``, and ``kept`` tokens are left of them.
    """

    pruned: str
    whole: str
    seen: NDArray[np.float32]
    regions: NDArray[np.int64]
    kept: int


def what_to_see(
    vit: str, image: Image.Image | None, number: int, caption: str | None
) -> tuple[Image.Image, str]:
    """Returns a picture, the held-out one of this number by default, and the caption for it.

    Raises:
        ConfigError: a caption for a classifier, or none for a picture of the user's.
    """
    reads = vit == "mini-clip"
    if not reads and caption is not None:
        raise ConfigError(f"{vit} is asked nothing; leave --question {caption!r} out.")
    if reads and image is not None and caption is None:
        raise ConfigError(f"{vit} compares a picture with a caption. Give one as --question.")
    asked = number, number + 1
    (sample,) = load_pairs("", *asked) if reads else load_objects(*asked)
    return image or sample.image, sample.question if caption is None else caption


def see(
    model: Any, inputs: Inputs, image: Image.Image, caption: str, strategy: str, keep: Keep
) -> Seen:
    """Returns what the model says of the picture with fewer tokens, and what it looked at."""
    pixels = inputs.images([image]).to(next(model.parameters()).device)
    with torch.inference_mode():
        with wrap(model, strategy, keep=keep) as handle:
            pruned = _said(model, inputs, pixels, caption)
            (selection,) = handle.selections
        whole = _said(model, inputs, pixels, caption)
    lit = kept_patches(selection)
    return Seen(pruned, whole, as_seen(pixels), regions_of(selection, lit), int(lit.sum()))


def kept_patches(selection: Selection) -> NDArray[np.bool_]:
    """Returns which patches of the one picture stay to the end, ``[rows, cols]``."""
    side = int(selection.n**0.5)
    lit = np.zeros(selection.n, dtype=bool)
    lit[selection.slots[0].cpu().numpy()] = True
    return lit.reshape(side, side)


def as_seen(pixels: torch.Tensor) -> NDArray[np.float32]:
    """Returns the picture that ``pixels`` ``[1, 3, H, W]`` are of, ``[H, W, 3]`` in 0 to 1."""
    return ((pixels[0].float().cpu().permute(1, 2, 0) + 1) / 2).numpy()


def _said(model: Any, inputs: Inputs, pixels: torch.Tensor, caption: str) -> str:
    if not inputs.reads:
        return CLASSES[int(model(pixels).argmax())]
    words = inputs.captions([caption]).to(pixels.device)
    towers = (model.encode_image(pixels, normalize=True), model.encode_text(words, normalize=True))
    return f"cosine {float((towers[0] * towers[1]).sum()):.2f}"
