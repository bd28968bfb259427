"""The shipped ViTs: which directory holds one, and what makes inputs of pictures and captions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from PIL import Image
from torch import Tensor

from vtprune.errors import ConfigError, UnsupportedError
from vtprune.eval import mini_clip, mini_vit
from vtprune.eval.scene_captions import tokenize
from vtprune.eval.scene_objects import SIDE
from vtprune.eval.train_data import scale


@dataclass(frozen=True)
class Inputs:
    """Makes inputs of pictures, and of captions where there is a text tower.

    Attributes:
        name: what a model of this kind is called.
        config: as in the model's directory.
    """

    name: str
    config: dict[str, Any]

    @property
    def reads(self) -> bool:
        """Whether the model has a text tower."""
        return self.name == mini_clip.NAME

    def images(self, images: Sequence[Image.Image]) -> Tensor:
        """Returns ``[B, 3, 112, 112]`` from -1 to 1; pictures of other sizes are resized."""
        side = (SIDE, SIDE)
        rgb = [image.convert("RGB") for image in images]
        return scale([image if image.size == side else image.resize(side) for image in rgb])

    def captions(self, captions: Sequence[str]) -> Tensor:
        """Returns ``[B, L]`` ids of words.

        Raises:
            UnsupportedError: the model reads no text.
            InputError: a word that it does not know, or too many.
        """
        if not self.reads:
            raise UnsupportedError(f"{self.name} reads no text. Give it images.")
        return tokenize(captions)


def kind_of(folder: Path) -> ModuleType | None:
    """Returns what loads the ViT in ``folder``, None where there is none."""
    if (folder / mini_clip.FILES[0]).is_file():
        return mini_clip
    return mini_vit if "architecture" in _json(folder / mini_vit.FILES[0]) else None


def load_vit(folder: Path) -> tuple[Any, Inputs]:
    """Returns the ViT in ``folder`` in evaluation mode, and what makes its inputs.

    Raises:
        ConfigError: it cannot be loaded, or it was not trained on the pictures of this package.
        ImportError: timm or open_clip is not installed.
    """
    kind = kind_of(folder)
    if kind is None:
        raise ConfigError(f"{folder} holds no ViT. Give the directory of one.")
    config = _json(folder / kind.FILES[0])
    if not _fits(config):
        raise ConfigError(
            f"The ViT in {folder} was not trained on the pictures of vtprune, so there is nothing "
            "to ask it. Give the directory of one that was, or wrap yours with vtprune.wrap."
        )
    return kind.load(folder), Inputs(kind.NAME, config)


def _fits(config: dict[str, Any]) -> bool:
    """Whether a model has the classes or the words of this package's pictures."""
    own = (mini_vit.CONFIG["pretrained_cfg"]["label_names"], mini_clip.ARGS["text_cfg"])
    labels = config.get("pretrained_cfg", {}).get("label_names")
    text = config.get("model_cfg", {}).get("text_cfg")
    return labels == own[0] or text == own[1]


def _json(file: Path) -> dict[str, Any]:
    """Returns what is in a file; nothing where it cannot be read."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
