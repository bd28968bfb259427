"""One image, one question: the answer, and a picture of the patches that were kept or merged."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from transformers import PreTrainedModel

from vtprune.engine.plan import wrap
from vtprune.engine.wrap import Handle
from vtprune.errors import ConfigError, UnsupportedError
from vtprune.eval import scenes
from vtprune.eval.regions import enlarged, in_mean_color, merges, moments_of, regions_of
from vtprune.eval.samples import CLIPS, MAX_NEW_TOKENS, TASKS, Asker, Video
from vtprune.eval.shipped import load
from vtprune.eval.shipped_vit import Inputs
from vtprune.eval.show_vit import see, what_to_see
from vtprune.types import Keep

QUESTION = "how many digits ?"
STRATEGY = "fastervlm"
DIMMED = 0.22  # brightness of a dropped patch
NOTHING = "(no answer)"


@dataclass(frozen=True)
class Shown:
    """What the model said with and without pruning, and how many visual tokens it saw."""

    question: str
    answer: str
    unpruned: str
    kept: int
    tokens: int


def what_to_show(
    path: Path | None,
    scene: int,
    question: str | None,
    vit: str | None = None,
    clip: int | None = None,
) -> tuple[Image.Image | Video, str]:
    """Returns what is seen and a question: the file, or else the held-out scene, or ``clip``.

    For a ``vit`` it is a held-out picture of its kind, and the caption in place of the question.

    Raises:
        ConfigError: the image cannot be read, the model is not asked this, or both an image and a
            clip are given.
    """
    if clip is not None:
        if path is not None or vit is not None:
            raise ConfigError(f"--clip {clip} is a video; leave the image, or the ViT, out.")
        (sample,) = TASKS[CLIPS].load(clip, clip + 1)
        return sample.seen, sample.question if question is None else question
    if vit is not None:
        return what_to_see(vit, path and open_image(path), scene, question)
    if path is not None:
        return open_image(path), QUESTION if question is None else question
    made = scenes.make_scene(scene)
    return made.image, scenes.pick_question(made, scene).text if question is None else question


def show(
    image: Image.Image | Video,
    question: str,
    strategy: str,
    keep: Keep,
    out: Path,
    model: str = "mini-llava",
) -> Shown:
    """Asks about the image or video, pruned and unpruned, and writes the picture to ``out``.

    Raises:
        VTPruneError: the picture cannot be written, the model or the strategy does not exist, or
            the question has words that the model does not know.
    """
    check_out(out)
    loaded, processor = load(model)
    if not isinstance(processor, Inputs) or isinstance(image, Video):
        return ask_and_draw(loaded, processor, image, question, strategy, keep, out)
    found = see(loaded, processor, image, question, strategy, keep)
    shown = Shown(question, found.pruned, found.whole, found.kept, found.regions.size)
    draw(found.seen, found.regions, shown, strategy, out)
    return shown


def ask_and_draw(
    model: PreTrainedModel,
    processor: Any,
    image: Image.Image | Video,
    question: str,
    strategy: str,
    keep: Keep,
    out: Path,
) -> Shown:
    """Does the work of ``show`` with a loaded model and image."""
    ask = Asker(processor)
    question = normalize(question)
    check_words(question, processor.tokenizer)
    inputs = {k: v.to(model.device) for k, v in ask([question], [image]).items()}
    with wrap(model, strategy, keep=keep, processor=processor) as handle:
        (pruned,) = ask.answers(model, inputs, MAX_NEW_TOKENS)
        bright = kept_mask(handle, inputs["input_ids"])
        regions = regions_of(handle.selections[0], bright)
    (unpruned,) = ask.answers(model, inputs, MAX_NEW_TOKENS)
    if isinstance(image, Video):
        seen, regions = moments_of(image.frames, regions)
    else:
        seen = what_is_seen(inputs["pixel_values"], processor.image_processor, image)
    shown = Shown(question, pruned, unpruned, int(bright.sum()), bright.size)
    draw(seen, regions, shown, strategy, out)
    return shown


def open_image(path: Path) -> Image.Image:
    """Returns the image in RGB, upright.

    Raises:
        ConfigError: there is no such file, or it is no whole image.
    """
    lenient, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:  # other packages let Pillow fill up what is missing, in the whole process
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError:
        raise ConfigError(f"There is no image file {path}. Give a path that exists.") from None
    except UnidentifiedImageError:
        reason = "it is in no image format that Pillow reads"
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = str(error)
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = lenient
    raise ConfigError(f"The image {path} cannot be read: {reason}. Give a whole PNG or JPEG file.")


def check_out(path: Path) -> None:
    """Raises ConfigError when no picture can be written to ``path``."""
    formats = Figure().canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in formats:
        raise ConfigError(
            f"--out {path}: give a file name that ends in one of {', '.join(sorted(formats))}."
        )
    if path.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        raise ConfigError(f"--out {path}: give a file in a folder that can be written.")


def normalize(question: str) -> str:
    """Returns the question in lower case, its question mark a word of its own."""
    return " ".join(re.sub(r"\s*\?+", " ?", question.lower()).split())


def check_words(question: str, tokenizer: Any) -> None:
    """Raises ConfigError when the tokenizer knows no token for a word of the question."""
    ids = tokenizer(question, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ConfigError("The question is empty. Ask something, such as 'how many digits ?'.")
    if tokenizer.unk_token_id is None or tokenizer.unk_token_id not in ids:
        return
    words = question.split()
    foreign = [w for w in words if tokenizer.unk_token_id in tokenizer(w)["input_ids"]]
    known = sorted(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens))
    raise ConfigError(
        f"The model knows no word {', '.join(map(repr, foreign))}. It knows: {' '.join(known)}."
    )


def what_is_seen(
    pixels: torch.Tensor, image_processor: Any, image: Image.Image
) -> NDArray[np.float32]:
    """Returns the image as the tower gets it, ``[H, W, 3]`` in 0 to 1.

    Raises:
        UnsupportedError: the model cuts an image into several.
    """
    if pixels.ndim == 2:  # patches of the whole image
        return np.asarray(image).astype(np.float32) / np.float32(255)
    if pixels.ndim != 4 or len(pixels) != 1:
        raise UnsupportedError(
            f"show draws models that see an image as one; this one gets pixels of shape "
            f"{tuple(pixels.shape)}. Use sweep with it instead."
        )
    mean, std = (torch.tensor(v) for v in (image_processor.image_mean, image_processor.image_std))
    seen = pixels[0].float().cpu().permute(1, 2, 0) * std + mean
    return seen.clamp(0, 1).numpy()


def kept_mask(handle: Handle, ids: torch.Tensor) -> NDArray[np.bool_]:
    """Returns which visual tokens of the one image stay to the end, ``[rows, cols]``.

    Of a video ``[T, rows, cols]``. A new row that a merge made counts where its slot is; ``ids``
    ``[1, L]`` are the prompt's.

    Raises:
        UnsupportedError: the tokens form no single grid.
    """
    images = handle.report().images
    first, grid = images[0], images[0].grid
    if len(images) > 1 or grid is None or math.prod(grid) != first.tokens:
        tokens = sum(image.tokens for image in images)
        raise UnsupportedError(
            f"show draws one grid of visual tokens; the {tokens} of this model form none. Use "
            "sweep with it instead."
        )
    placeholders = torch.tensor([m.placeholder for m in handle.adapter.modalities]).to(ids)
    final = handle.final
    assert final is not None  # there was a call
    slots = torch.isin(ids[0], placeholders).nonzero()[:, 0]
    shape = grid if grid[0] > 1 else grid[1:]
    return torch.isin(slots, final[0]).reshape(shape).cpu().numpy()


def draw(
    seen: NDArray[np.float32], regions: NDArray[np.int64], shown: Shown, strategy: str, out: Path
) -> None:
    """Writes the image beside its copy in which dropped patches are dark and kept ones framed.

    Patches that are one token have their mean color, and a frame together.
    """
    light = np.where(enlarged(regions, seen.shape) >= 0, 1.0, DIMMED)[:, :, None]
    wide = seen.shape[1] > 2 * seen.shape[0]  # frames side by side
    figure = Figure(figsize=(10, 4 if wide else 5.5), dpi=120, layout="constrained")
    left, right = figure.subplots(2, 1) if wide else figure.subplots(1, 2)
    left.imshow(seen)
    left.set_title(
        f"all {shown.tokens} visual tokens: {shown.unpruned or NOTHING}", parse_math=False
    )
    right.imshow((in_mean_color(seen, regions) if merges(regions) else seen) * light)
    lines = frames(regions, seen.shape[:2])
    right.add_collection(LineCollection(lines, colors="w", linewidths=0.8))
    right.set_title(
        f"{strategy}, {shown.kept} of {shown.tokens} left: {shown.answer or NOTHING}",
        parse_math=False,
    )
    for axes in (left, right):
        axes.set_axis_off()
    figure.suptitle(shown.question, fontsize=14, parse_math=False)
    figure.savefig(out)


def frames(regions: NDArray[Any], size: Sequence[int]) -> list[list[tuple[float, float]]]:
    """Returns the lines between patches of different regions, as ends (x, y) in pixels."""
    high, wide = size[0] / regions.shape[0], size[1] / regions.shape[1]
    upright = np.argwhere(regions[:, 1:] != regions[:, :-1]) + (0, 1)
    level = np.argwhere(regions[1:] != regions[:-1]) + (1, 0)
    ends = [((y, x), (y + 1, x)) for y, x in upright] + [((y, x), (y, x + 1)) for y, x in level]
    return [[(x * wide - 0.5, y * high - 0.5) for y, x in pair] for pair in ends]
