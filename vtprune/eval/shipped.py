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
SUMS = "SHA256SUMS"  # written with sha256sum, checked on every load
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
        ConfigError: there is no such model, its files are missing, damaged or do not fit, or those
            of a shipped model are not the ones that were shipped.
    """
    local = _directory(name)
    if name in names():
        verify(name)
    elif local is not None:
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


def verify(name: str) -> None:
    """Checks the files of a shipped model against their SHA-256 sums.

    Raises:
        ConfigError: a file is missing or is not the one that was shipped.
    """
    path = MODELS / name
    _check_files(path)
    for line in (path / SUMS).read_text(encoding="utf-8").splitlines():
        wanted, file = line.split(maxsplit=1)
        found = hashlib.sha256((path / file).read_bytes()).hexdigest()
        if found != wanted:
            raise ConfigError(
                f"{path / file} is not the file that was shipped (SHA-256 {found[:12]}..., not "
                f"{wanted[:12]}...). Install vtprune again. Weights of your own are loaded by the "
                "path of a directory elsewhere."
            )


def describe(name: str) -> str:
    """Returns the first sentence of a shipped model's card."""
    card = (MODELS / name / "README.md").read_text(encoding="utf-8")
    paragraphs = [text for text in card.split("\n\n") if not text.startswith("#")]
    return paragraphs[0].partition(". ")[0].replace("\n", " ").rstrip(".")


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
    if path.parent == MODELS and not (path / SUMS).exists():
        missing.append(SUMS)
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
