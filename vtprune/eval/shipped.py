"""Loads a model with its processor: one shipped with this package, a directory, or a hub id."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

from vtprune.errors import ConfigError
from vtprune.registry import unknown

MODELS = Path(__file__).parent / "models"
DEFAULT = "mini-llava"
# What a directory must hold: one file of each row.
PARTS = (
    ("config.json",),
    ("model.safetensors", "model.safetensors.index.json"),
    ("processor_config.json", "preprocessor_config.json"),
    ("tokenizer.json", "tokenizer.model", "vocab.json"),
)


def names() -> list[str]:
    """Returns the names of the shipped models."""
    return sorted({DEFAULT, *(path.name for path in MODELS.glob("*/"))})


def load(name: str = DEFAULT) -> tuple[PreTrainedModel, Any]:
    """Returns the model in float32 and evaluation mode, and its processor.

    Args:
        name: a shipped model, the path of a local directory, or ``owner/name`` on the hub. The
            first two never touch the network.

    Raises:
        ConfigError: there is no such model, or its files are missing, damaged or do not fit.
    """
    local = _directory(name)
    if local is not None:
        _check_files(local)
    source = name if local is None else str(local)
    where: dict[str, Any] = {"local_files_only": local is not None}
    try:
        processor = AutoProcessor.from_pretrained(source, **where)
        loaded = AutoModelForImageTextToText.from_pretrained(
            source, dtype=torch.float32, output_loading_info=True, **where
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f"The model {name!r} cannot be loaded from {source}: {reason}") from error
    model, info = cast(Any, loaded)
    _check_weights(name, info["missing_keys"])
    return model.eval(), processor


def fingerprint(model: PreTrainedModel) -> str:
    """Returns 16 hex digits that differ for other weights: every tensor's name, shape and ends."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        flat = tensor.detach().flatten()
        ends = torch.cat([flat[:64], flat[-64:]]).cpu().float()
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(ends.numpy().tobytes())
    return digest.hexdigest()[:16]


def _directory(name: str) -> Path | None:
    """Returns the local directory that ``name`` means, or None for a hub id."""
    if name in names():
        return MODELS / name
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    owner, slash, rest = name.partition("/")
    is_hub_id = slash and owner not in ("", ".", "..", "~") and rest and "/" not in rest
    if is_hub_id and not path.exists():
        return None
    if slash or path.exists():
        raise ConfigError(
            f"The model {name!r} is no directory. Give the directory of a saved model, a hub id "
            f"such as 'llava-hf/llava-1.5-7b-hf', or a shipped model: {', '.join(names())}."
        )
    raise unknown("model", name, names())


def _check_files(path: Path) -> None:
    missing = [some[0] for some in PARTS if not any((path / file).exists() for file in some)]
    if missing:
        remedy = "Install vtprune again" if path.parent == MODELS else "Save the model again"
        raise ConfigError(
            f"The model directory {path} lacks {', '.join(missing)}. {remedy}, or choose another."
        )


def _check_weights(name: str, missing: set[str]) -> None:
    if missing:
        some = ", ".join(sorted(missing)[:3])
        raise ConfigError(
            f"The weights of {name!r} lack {len(missing)} tensors that its configuration needs "
            f"({some}, ...). Its files do not belong together; save or download it again."
        )
