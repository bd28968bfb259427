"""A ViT classifier small enough to ship, of timm's class.

Deep and narrow on purpose, as the other shipped models: methods name blocks of a ViT of 12. Needs
timm, which comes with the extra ``vit``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vtprune.errors import ConfigError
from vtprune.eval._extras import need
from vtprune.eval.scene_objects import CLASSES, SIDE, Picture, make_picture
from vtprune.eval.train_data import scale

NAME = "mini-vit"
ARCHITECTURE = "vit_tiny_patch16_224"  # timm's name for what ``ARGS`` alter
PATCH = 8
GRID = SIDE // PATCH
WIDTH = 96
ARGS = {
    "img_size": SIDE,
    "patch_size": PATCH,
    "embed_dim": WIDTH,
    "depth": 12,
    "num_heads": 3,
    "mlp_ratio": 3,
    "pre_norm": True,
    "num_classes": len(CLASSES),
}
# As timm saves models, so that timm.create_model("local-dir:...") reads them too.
CONFIG = {
    "architecture": ARCHITECTURE,
    "num_classes": len(CLASSES),
    "num_features": WIDTH,
    "global_pool": "token",
    "model_args": ARGS,
    "pretrained_cfg": {
        "input_size": [3, SIDE, SIDE],
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "crop_pct": 1.0,
        "num_classes": len(CLASSES),
        "pool_size": None,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "apache-2.0",
        "label_names": list(CLASSES),
    },
}
FILES = ("config.json", "model.safetensors")


def build_model(seed: int = 0) -> Any:
    """Returns an untrained ``timm.models.VisionTransformer`` (12 blocks, 96 wide) in float32.

    It takes ``[B, 3, 112, 112]`` from -1 to 1 and returns ``[B, 112]`` logits; between them are a
    CLS and 196 visual tokens.

    Raises:
        ImportError: timm is not installed.
    """
    torch.manual_seed(seed)
    return _create(ARCHITECTURE, ARGS)


def save(model: nn.Module, folder: Path) -> None:
    """Writes ``config.json`` and ``model.safetensors`` to ``folder``."""
    save_with(model, folder, FILES, CONFIG)


def save_with(model: nn.Module, folder: Path, files: Sequence[str], config: Any) -> None:
    """Writes a configuration and the weights to ``folder``, in ``files`` of these names."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / files[0]).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    weights = {name: tensor.contiguous().cpu() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / files[1], metadata={"format": "pt"})


def load(folder: Path) -> Any:
    """Returns the model that ``save`` wrote, in evaluation mode, on the CPU, in float32.

    Raises:
        ConfigError: a file is missing or damaged, or the weights do not fit the configuration.
        ImportError: timm is not installed.
    """
    model = load_with(
        folder, FILES, lambda config: _create(config["architecture"], config["model_args"])
    )
    model.pretrained_cfg |= {"source": "local-dir", "file": str(folder)}  # as timm notes it
    return model


def load_with(folder: Path, files: Sequence[str], create: Callable[[Any], Any]) -> Any:
    """Returns the model that ``create`` makes of a configuration, with its weights.

    Args:
        files: the names of configuration and weights in ``folder``.

    Raises:
        ConfigError: a file is missing or damaged, or the weights do not fit the configuration.
    """
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise ConfigError(
            f"The model directory {folder} lacks {', '.join(missing)}. Save the model again, or "
            "choose another."
        )
    try:
        model = create(json.loads((folder / files[0]).read_text(encoding="utf-8")))
        model.load_state_dict(load_file(folder / files[1]))
    except ImportError:
        raise
    except Exception as error:  # damaged files make timm and safetensors raise anything
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f"The model in {folder} cannot be loaded: {reason}") from error
    return model.eval()


def preprocess(pictures: Sequence[Picture]) -> Tensor:
    """Returns ``[B, 3, 112, 112]`` from -1 to 1."""
    return scale([picture.image for picture in pictures])


@torch.inference_mode()
def right(model: nn.Module, n: int, split: str = "test", batch: int = 56) -> list[bool]:
    """Whether the model names the class of each of the first ``n`` pictures of ``split``."""
    found = []
    for first in range(0, n, batch):
        pictures = [make_picture(i, split) for i in range(first, min(first + batch, n))]
        pixels = preprocess(pictures).to(next(model.parameters()).device)
        given = model(pixels).argmax(-1).tolist()
        found += [answer == p.label for answer, p in zip(given, pictures, strict=True)]
    return found


def _create(architecture: str, args: dict[str, Any]) -> Any:
    return need("timm", extra="vit").create_model(architecture, pretrained=False, **args)
