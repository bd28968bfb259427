"""A pair of image and text tower small enough to ship, of open_clip's class.

The image tower has the shape of ``mini-vit``; the text tower reads captions word by word. Needs
open_clip, which comes with the extra ``vit``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from vtprune.eval import mini_vit
from vtprune.eval._extras import need
from vtprune.eval.scene_captions import LENGTH, WORDS
from vtprune.eval.scene_objects import SIDE

NAME = "mini-clip"
WIDTH = 96  # of the space that both towers lead to
ARGS: dict[str, Any] = {
    "embed_dim": WIDTH,
    "vision_cfg": {
        "image_size": SIDE,
        "patch_size": mini_vit.PATCH,
        "width": mini_vit.WIDTH,
        "head_width": mini_vit.WIDTH // mini_vit.ARGS["num_heads"],
        "layers": mini_vit.ARGS["depth"],
        "mlp_ratio": mini_vit.ARGS["mlp_ratio"],
        "norm_kwargs": {"eps": 1e-6},
    },
    "text_cfg": {
        "context_length": LENGTH,
        "vocab_size": len(WORDS),
        "width": 64,
        "heads": 2,
        "layers": 4,
    },
}
# As open_clip saves models, so that open_clip.create_model("local-dir:...") reads them too.
CONFIG = {
    "model_cfg": ARGS,
    "preprocess_cfg": {"size": [SIDE, SIDE], "mean": [0.5] * 3, "std": [0.5] * 3},
}
FILES = ("open_clip_config.json", "open_clip_model.safetensors")


def build_model(seed: int = 0) -> Any:
    """Returns an untrained ``open_clip.model.CLIP`` in float32.

    ``encode_image`` takes ``[B, 3, 112, 112]`` from -1 to 1, of which it makes a CLS and 196 visual
    tokens; ``encode_text`` what ``scene_captions.tokenize`` returns. Both give ``[B, 96]``.

    Raises:
        ImportError: open_clip is not installed.
    """
    torch.manual_seed(seed)
    return _create(ARGS)


def save(model: nn.Module, folder: Path) -> None:
    """Writes the configuration and the weights to ``folder``."""
    mini_vit.save_with(model, folder, FILES, CONFIG)


def load(folder: Path) -> Any:
    """Returns the model that ``save`` wrote, in evaluation mode, on the CPU, in float32.

    Raises:
        ConfigError: a file is missing or damaged, or the weights do not fit the configuration.
        ImportError: open_clip is not installed.
    """
    model = mini_vit.load_with(folder, FILES, lambda config: _create(config["model_cfg"]))
    model.pretrained_cfg = {"source": "local-dir", "file": str(folder)}  # as timm notes it
    return model


def _create(args: dict[str, Any]) -> Any:
    return need("open_clip.model", extra="vit").CLIP(**args)
