"""CARVE: what a question makes a model look at more than a general instruction does.

Some tokens draw attention whatever is asked. The ratio of two passes leaves them out; by it tokens
are kept, or the image is cut down to what the question is about. arXiv 2509.06461
(YuyaoGe/CARVE). Defaults: official code, whose layers 20 to 25 are of at least 28.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vtprune.contrast._extras import scipy_ndimage
from vtprune.contrast.looking import Look, look
from vtprune.engine.plan import find_adapter
from vtprune.errors import ConfigError, InputError
from vtprune.scoring.contrastive import LAMBDA, Steps, check_steps, over_steps
from vtprune.types import Facts

GENERAL = "Write a general description of the image."
SHORT = " Answer the question using a single word or phrase."  # behind either, by the authors
LEAST = 3  # components that stay


def default_layers(facts: Facts) -> tuple[int, ...]:
    """Returns layers 20 to 25, or their share of fewer than 28; 0-based, ascending."""
    depth = min(28, facts.decoder_layers)
    return tuple(sorted({min(round(layer * depth / 28), depth - 1) for layer in range(20, 26)}))


def relevance(
    model: Any,
    asked: Mapping[str, Any],
    general: Mapping[str, Any],
    *,
    layers: Sequence[int] | None = None,
    steps: Steps = "all",
    max_new_tokens: int = 32,
    lam: float = LAMBDA,
) -> list[Look]:
    """Returns how relevant the tokens of each image and video are to the question.

    Both batches are answered greedily by the unwrapped model, with a cache.

    Args:
        model: wrapped or not.
        asked: what ``generate`` takes, padded on the left; general: the same images, with
            ``GENERAL`` in the place of the question.
        layers: 0-based, of the language model; None = as ``default_layers`` says.
        steps: the ``first``, which takes but two prefills, the ``last`` or ``all``.

    Returns:
        Per image relevance ``[1, 1, N]`` in the place of attention, of tokens made of patches.

    Raises:
        ConfigError: a value out of range. InputError: batches of different images.
    """
    check_steps(steps)
    if isinstance(max_new_tokens, bool) or max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens={max_new_tokens!r} must be at least 1.")
    chosen = default_layers(find_adapter(model).facts) if layers is None else layers
    n = 1 if steps == "first" else max_new_tokens
    ours, plain = look(model, asked, chosen, n), look(model, general, chosen, n)
    if len(ours) != len(plain):
        raise InputError(
            f"The question has {len(ours)} images, the general instruction {len(plain)}. Give both "
            "the same."
        )
    return [
        Look(over_steps(one.attention, other.attention, steps, lam)[None, None], one.grid)
        for one, other in zip(ours, plain, strict=True)
    ]


def focus(
    image: Image.Image, relevance: Tensor, share: float = 0.2, parts: float = 0.2
) -> Image.Image:
    """Returns the image cut down to its most relevant parts, enlarged, all else black.

    Args:
        image: any mode; relevance: ``[h, w]`` over it.
        share: of its pixels, the most relevant, which form parts (4-connected).
        parts: the share of these that stays, those with most relevance in sum, but 3 at least.

    Returns:
        An RGB image, at least as large as ``image`` in both directions.

    Raises:
        ConfigError: a share that is not in (0, 1]. InputError: relevance that is no finite map.
        ImportError: scipy is missing.
    """
    for name, value in {"share": share, "parts": parts}.items():
        if isinstance(value, bool) or not 0 < value <= 1:
            raise ConfigError(f"{name}={value!r} must be above 0 and at most 1.")
    width, height = image.size
    wide = enlarged(relevance, (height, width), "bilinear")
    mask = _parts(wide, wide >= _quantile(wide, 1 - share), parts)
    rows, columns = mask.any(1).nonzero()[:, 0].tolist(), mask.any(0).nonzero()[:, 0].tolist()
    box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    cut = blackened(image, mask).crop(box)
    scale = max(width / cut.width, height / cut.height)
    size = round(cut.width * scale), round(cut.height * scale)
    return cut.resize(size, Image.Resampling.LANCZOS)


def enlarged(relevance: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """Returns ``[h, w]`` stretched to ``size``, float32 on the CPU.

    Raises:
        InputError: it has another number of dimensions, or values that are not finite.
    """
    if relevance.ndim != 2 or not bool(relevance.isfinite().all()):
        raise InputError(
            f"The map has shape {tuple(relevance.shape)}; give finite values [h, w] over the image."
        )
    values = relevance.detach().float().cpu()[None, None]
    return F.interpolate(values, size=size, mode=mode, align_corners=False)[0, 0]


def blackened(image: Image.Image, mask: Tensor) -> Image.Image:
    """Returns the image in RGB, black outside ``mask`` ``[H, W]`` bool."""
    spots = Image.frombytes("L", image.size, (mask.to(torch.uint8) * 255).numpy().tobytes())
    return Image.composite(image.convert("RGB"), Image.new("RGB", image.size), spots)


def _quantile(values: Tensor, share: float) -> Tensor:
    """As numpy's percentile; torch's takes no more than 16 million values."""
    ranked, place = values.flatten().sort().values, share * (values.numel() - 1)
    low = int(place)
    high = min(low + 1, len(ranked) - 1)
    return torch.lerp(ranked[low], ranked[high], place - low)


def _parts(relevance: Tensor, mask: Tensor, share: float) -> Tensor:
    """Returns what of ``mask`` ``[H, W]`` bool is in its most relevant parts."""
    labels, n = scipy_ndimage().label(mask.numpy())
    labels = torch.from_numpy(labels).long()
    sums = torch.zeros(n + 1).index_add_(0, labels.flatten(), relevance.flatten())
    best = sums[1:].sort(descending=True, stable=True).indices[: max(LEAST, int(n * share))] + 1
    return torch.isin(labels, best)
