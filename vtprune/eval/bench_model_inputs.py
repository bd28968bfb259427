"""Inputs of a benchmark: a picture and a question, by a processor or from a configuration alone."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    GotOcr2ImageProcessor,
    LlavaNextImageProcessor,
    LlavaOnevisionImageProcessor,
    Qwen2VLImageProcessor,
)

from vtprune.engine.plan import find_adapter
from vtprune.errors import ConfigError
from vtprune.eval import scenes
from vtprune.eval.samples import Asker

# By model_type, what makes pixels of pictures.
FAMILIES: dict[str, Any] = {
    "internvl": GotOcr2ImageProcessor,
    "llava": CLIPImageProcessor,
    "llava_next": LlavaNextImageProcessor,
    "llava_onevision": LlavaOnevisionImageProcessor,
    "qwen2_5_vl": Qwen2VLImageProcessor,
    "qwen2_vl": Qwen2VLImageProcessor,
    "qwen3_vl": Qwen2VLImageProcessor,
    "qwen3_vl_moe": Qwen2VLImageProcessor,
}
TILED = ("internvl", "llava_next", "llava_onevision")  # shown at twice the side of a tile
ANY_SIDE = 1008  # of towers that take any: 36 x 36 tokens of 28 pixels
LARGEST = 16384 * 28 * 28  # pixels, as Qwen's checkpoints have it
TILES = 12  # of InternVL at most, besides the thumbnail
BEFORE, WORDS = 4, 32  # words before the picture, and in all
SCENE = 5  # a held-out scene; it is the same in all rows

Size = tuple[int, int]


def parse_size(text: str) -> Size:
    """Returns width and height in pixels of ``672`` or ``672x448``.

    Raises:
        ConfigError: it is neither, or below 16 pixels.
    """
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.strip().isdecimal() for part in parts):
        raise ConfigError(
            f"--resolution {text!r} is not understood. Give pixels such as 672, or 672x448."
        )
    wide, high = int(parts[0]), int(parts[-1])
    if min(wide, high) < 16 or max(wide, high) > 8192:
        raise ConfigError(f"--resolution {text!r}: give 16 to 8192 pixels.")
    return wide, high


def default_size(config: Any, processor: Any = None) -> Size:
    """Returns the size of picture that a model is shown where none is asked for.

    Args:
        processor: its own, if there is one: of pictures of any size it may not take so many pixels.
    """
    side = getattr(config.vision_config, "image_size", None)
    if side is None:
        most = LARGEST if processor is None else processor.image_processor.size["longest_edge"]
        side = min(ANY_SIDE, math.isqrt(most))
    side = side if isinstance(side, int) else side[0]
    side *= 2 if config.model_type in TILED else 1
    return side, side


def picture(size: Size) -> Image.Image:
    """Returns a held-out scene at that size."""
    return scenes.make_scene(SCENE, "test").image.resize(size)


class Asked:
    """Inputs as a model's own processor makes them of a scene and a question about it."""

    def __init__(self, model: Any, processor: Any) -> None:
        """Raises ConfigError where the processor has no chat template."""
        self.model, self.processor, self._ask = model, processor, Asker(processor)

    def __call__(self, batch: int, size: Size) -> dict[str, Any]:
        """Returns ``batch`` equal rows."""
        scene = scenes.make_scene(SCENE, "test")
        question = scenes.pick_question(scene, SCENE).text
        inputs = self._ask([question] * batch, [picture(size)] * batch)
        return {name: _there(self.model, value) for name, value in inputs.items()}


class Made:
    """Inputs of a model without a processor: the family's pixels, placeholders, random words."""

    class processor:
        """As much of a processor as a strategy guided by text asks for."""

        class tokenizer:
            """Has no special tokens."""

            all_special_ids = ()

    def __init__(self, model: Any) -> None:
        """Raises ConfigError for a family whose inputs cannot be made."""
        if model.config.model_type not in FAMILIES:
            raise ConfigError(
                f"Inputs of {model.config.model_type!r} cannot be made without a processor; those "
                f"of {', '.join(FAMILIES)} can."
            )
        self.model, self.adapter = model, find_adapter(model)
        self.images = FAMILIES[model.config.model_type](**_settings(model.config))

    def __call__(self, batch: int, size: Size) -> dict[str, Any]:
        """Returns ``batch`` equal rows of ``WORDS`` words around a picture."""
        found = dict(self.images([picture(size)] * batch, return_tensors="pt"))
        known = inspect.signature(type(self.model).forward).parameters
        visual = {name: value for name, value in found.items() if name in known}
        ids = self._ids(sum(self.counts(visual)) // batch).expand(batch, -1)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **visual}
        if self.adapter.facts.mrope:
            inputs["mm_token_type_ids"] = (ids == self.model.config.image_token_id).long()
        return {name: _there(self.model, value) for name, value in inputs.items()}

    def counts(self, visual: dict[str, Any]) -> list[int]:
        """Returns the visual tokens of each image or tile, as the model's own connector has it."""
        image, pixels = self.adapter.modalities[0], visual["pixel_values"]
        n = len(pixels)  # of patches, where a tower packs those of all images
        if pixels.ndim > 2:
            side = self.model.config.vision_config.patch_size
            side = side if isinstance(side, int) else side[0]
            *tiles, _, high, wide = pixels.shape
            n = math.prod(tiles) * (high // side) * (wide // side)
        return [len(item) for item in self.adapter.carry(image, torch.zeros(n, 1), visual)]

    def _ids(self, n: int) -> Tensor:
        """Returns the prompt ``[1, WORDS + n]``."""
        config = self.model.config
        placeholders = {modality.placeholder for modality in self.adapter.modalities}
        most = min(1000, config.text_config.vocab_size)
        usual = [i for i in range(3, most) if i not in placeholders]
        drawn = torch.randint(len(usual), (WORDS,), generator=torch.Generator().manual_seed(1))
        words = torch.tensor(usual)[drawn]
        image = torch.full((n,), config.image_token_id)
        return torch.cat([words[:BEFORE], image, words[BEFORE:]])[None]


def _there(model: Any, value: Any) -> Any:
    """Moves a tensor to the model; numbers with a point get its dtype."""
    if not isinstance(value, Tensor):
        return value
    return value.to(model.device, model.dtype if value.is_floating_point() else None)


def _settings(config: Any) -> dict[str, Any]:
    """Returns the settings of the family's image processor that its shapes depend on."""
    vision = config.vision_config
    if hasattr(vision, "spatial_merge_size"):
        patch, merge = vision.patch_size, vision.spatial_merge_size
        return {
            "patch_size": patch,
            "temporal_patch_size": vision.temporal_patch_size,
            "merge_size": merge,
            "size": {"shortest_edge": (patch * merge) ** 2, "longest_edge": LARGEST},
        }
    side = vision.image_size if isinstance(vision.image_size, int) else vision.image_size[0]
    square = {"height": side, "width": side}
    settings: dict[str, Any] = {"size": square}
    if config.model_type == "internvl":
        settings |= {"crop_to_patches": True, "min_patches": 1, "max_patches": TILES}
    elif config.model_type in TILED:
        settings["image_grid_pinpoints"] = config.image_grid_pinpoints
    if config.model_type in ("llava", "llava_next"):
        settings["crop_size"] = square
    return settings
