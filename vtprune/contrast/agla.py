"""AGLA: the image without what the question is not about, as a second view to decode with.

Its logits are added to those of the whole image: ``ContrastiveDecoder(model, batch, alpha=2,
beta=0.5, sign=1)``, with the masked image in ``batch``. CVPR 2025, arXiv 2406.12718. Officially
BLIP's matching model says where the question is about the image; here any callable does. Two are
here: the model's own attention, and CLIP. Defaults of the mask: official code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from vtprune.contrast._extras import scipy_ndimage
from vtprune.contrast.carve import blackened, default_layers, enlarged
from vtprune.contrast.looking import look
from vtprune.engine.plan import find_adapter
from vtprune.engine.text_tower import TextTower
from vtprune.errors import ConfigError, UnsupportedError

BLUR = 0.02  # of the longer side: the deviation of the Gaussian that smooths the map


class Saliency(NamedTuple):
    """Where an image is about a question.

    Attributes:
        map: ``[h, w]`` over the image, of any range, higher = more.
        match: from -1 to 1, how well the two fit as a whole; the better, the less of it stays.
    """

    map: Tensor
    match: float


Provider = Callable[[Image.Image, str], Saliency]


def masked(image: Image.Image, saliency: Saliency) -> Image.Image:
    """Returns the image in RGB, black where it is least about the question.

    The share ``1 - match / 2`` of its pixels stays, those where the map is highest once it is
    stretched to the image, smoothed, and the like.

    Raises:
        ConfigError: ``match`` out of range. InputError: a map that is no finite one.
        ImportError: scipy is missing.
    """
    match = float(saliency.match)
    if not -1 <= match <= 1:
        raise ConfigError(f"match={saliency.match!r} must be a cosine, from -1 to 1.")
    width, height = image.size
    wide = enlarged(_unit(saliency.map), (height, width), "bicubic")
    smooth = scipy_ndimage().gaussian_filter(
        wide.numpy(), BLUR * max(width, height), mode="nearest"
    )
    values = torch.from_numpy(smooth)
    share = min(1 - match / 2, 1 - 1e-5)
    rank = min(int(values.numel() * share), values.numel() - 1)
    floor = values.flatten().sort(descending=True).values[rank]
    return blackened(image, values >= floor)


def _unit(values: Tensor) -> Tensor:
    """Stretches a map to 0 to 1; zeros where all of it is equal."""
    values = values.float()
    low, high = values.amin(), values.amax()
    return (values - low) / (high - low).clamp(min=torch.finfo(torch.float32).tiny)


class AttentionSaliency:
    """Where the words after an image look in it, mean over layers and words: a ``Provider``.

    Args:
        model: wrapped or not; processor: its own, with a chat template.
        layers: 0-based, of the language model; None = as ``carve.default_layers`` says.
        match: taken for every image: attention does not say how well a question fits.
    """

    def __init__(
        self, model: Any, processor: Any, layers: Sequence[int] | None = None, match: float = 0.5
    ) -> None:
        if layers is None:
            layers = default_layers(find_adapter(model).facts)
        self.model, self.processor, self.layers, self.match = model, processor, layers, match

    def __call__(self, image: Image.Image, question: str) -> Saliency:
        """Returns the attention over the image's grid.

        Raises:
            UnsupportedError: its tokens form no grid.
        """
        content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
        batch = self.processor.apply_chat_template(
            [[{"role": "user", "content": content}]],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=True,
        ).to(self.model.device)
        (seen,) = look(self.model, batch, self.layers, words=True)
        if seen.grid is None or seen.grid[0] != 1:
            raise UnsupportedError(
                "The tokens of this image form no grid: its tiles overlap. Give another saliency, "
                "such as CLIPSaliency."
            )
        return Saliency(seen.attention[0].mean(0).view(seen.grid[1:]), self.match)


class CLIPSaliency:
    """How a CLIP finds patches and image like the question: a ``Provider``.

    As TRIM has it, a patch is the more relevant the lower its own cosine to the text.

    Args:
        clip: a ``CLIPModel``; tokenizer, image_processor: its own. The latter must not crop, or the
            map would be of a part of the image.
    """

    def __init__(self, clip: Any, tokenizer: Any, image_processor: Any) -> None:
        self.tower, self.image_processor = TextTower((clip, tokenizer), clip), image_processor
        if getattr(image_processor, "do_center_crop", False):
            raise ConfigError(
                "The image processor crops, so that the map would not be of the whole image. Load "
                "it with do_center_crop=False and size of two equal sides."
            )

    @torch.no_grad()
    def __call__(self, image: Image.Image, question: str) -> Saliency:
        """Returns the map over the patches, and the cosine of image and text."""
        pixels = self.image_processor(image.convert("RGB"), return_tensors="pt")["pixel_values"]
        vision = self.tower.clip.vision_model
        weight = self.tower.clip.visual_projection.weight
        hidden = vision(pixels.to(weight.device, weight.dtype)).last_hidden_state
        tokens = torch.nn.functional.normalize(self.tower.patches(hidden)[0], dim=-1)
        (words,) = self.tower.words([question])
        text = torch.nn.functional.normalize(words.to(tokens.device), dim=-1).mean(0)
        cosines = tokens @ text  # [1 + N], the first of [CLS]
        side = math.isqrt(len(cosines) - 1)
        return Saliency(-cosines[1:].view(side, side), float(cosines[0]))
