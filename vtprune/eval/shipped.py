"""Loads a model with its processor: one shipped with this package, a directory, or a hub id.

Shipped are vision-language models and ViTs; these have in place of a processor what makes inputs
of pictures, and of captions (``shipped_vit.Inputs``).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from vtprune.errors import ConfigError
from vtprune.eval.shipped_vit import Inputs, kind_of, load_vit
from vtprune.registry import unknown

MODELS = Path(__file__).parent / "models"
DEFAULT = "mini-llava"
SUMS = "SHA256SUMS"  # written with sha256sum, checked on every load
UNSUMMED = {SUMS, "README.md", "training_log.jsonl"}
DTYPES = ("float32", "bfloat16", "float16", "auto")
# What the directory of a vision-language model must hold: one file of each row.
PARTS = (
    ("config.json",),
    ("model.safetensors", "model.safetensors.index.json"),
    ("processor_config.json", "preprocessor_config.json"),
    ("tokenizer.json", "tokenizer.model", "vocab.json"),
)


def names() -> list[str]:
    """Returns the names of the shipped models."""
    return sorted({DEFAULT, *(path.name for path in MODELS.glob("*/"))})


def vlm_names() -> list[str]:
    """Returns the names of those that are vision-language models."""
    return [name for name in names() if kind_of(MODELS / name) is None]


def vit(name: str) -> str | None:
    """Returns which shipped ViT a model is, or is of the kind of; None for other models.

    Raises:
        ConfigError: there is no such model.
    """
    local = directory(name)
    kind = None if local is None else kind_of(local)
    return None if kind is None else kind.NAME


def load(name: str = DEFAULT, device: str = "cpu", dtype: str = "float32") -> tuple[Any, Any]:
    """Returns the model in evaluation mode, and its processor, or ``Inputs`` for a ViT.

    Args:
        name: a shipped model, the path of a local directory, or ``owner/name`` on the hub. The
            first two never touch the network.
        device: as torch names it.
        dtype: one of ``DTYPES``; ``auto`` is what the weights are saved in.

    Raises:
        ConfigError: there is no such device, dtype or model, its files are missing, damaged or do
            not fit, or those of a shipped model are not the ones that were shipped.
        ImportError: a ViT is asked for, but not timm or open_clip, which have its classes, is
            installed.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r} is not known; choose one of {', '.join(DTYPES)}.")
    local = directory(name)
    if name in names():
        verify(name)
    elif local is not None:
        _check_files(local)
    if local is not None and kind_of(local) is not None:
        model, processor = load_vit(local)
        model = model.to(getattr(torch, "float32" if dtype == "auto" else dtype))
    else:
        model, processor = _load_vlm(name, local, dtype)
    try:
        return model.to(torch.device(device)).eval(), processor
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f"device={device!r} cannot be used: {reason}") from error


def _load_vlm(name: str, local: Path | None, dtype: str) -> tuple[Any, Any]:
    source = name if local is None else str(local)
    where: dict[str, Any] = {"local_files_only": local is not None}
    try:
        processor = AutoProcessor.from_pretrained(source, **where)
        loaded = AutoModelForImageTextToText.from_pretrained(
            source, dtype=dtype, output_loading_info=True, **where
        )
    except Exception as error:  # damaged files make transformers raise anything
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f"The model {name!r} cannot be loaded from {source}: {reason}") from error
    model, info = cast(Any, loaded)
    _check_weights(name, info["missing_keys"])
    return model, processor


def verify(name: str) -> None:
    """Checks the files of a shipped model against their SHA-256 sums.

    Raises:
        ConfigError: a file is missing, has no sum, or is not the one that was shipped.
    """
    path = MODELS / name
    lines = (path / SUMS).read_text(encoding="utf-8").splitlines() if (path / SUMS).exists() else []
    pairs = [line.split(maxsplit=1) for line in lines if line.strip()]
    sums = {file: wanted for wanted, file in pairs}
    _check_files(path, sums)
    for file in sorted(path.iterdir()):
        if file.name in UNSUMMED:
            continue
        found = hashlib.sha256(file.read_bytes()).hexdigest()
        wanted = sums.get(file.name, "none")
        if found != wanted:
            raise ConfigError(
                f"{file} is not the file that was shipped (its SHA-256 is {found[:12]}..., the "
                f"one in {SUMS} {wanted[:12]}). Install vtprune again. Weights of your own are "
                "loaded by the path of a directory elsewhere."
            )


def describe(name: str) -> str:
    """Returns the first sentence of a shipped model's card."""
    card = (MODELS / name / "README.md").read_text(encoding="utf-8")
    paragraphs = [text for text in card.split("\n\n") if not text.startswith("#")]
    return paragraphs[0].partition(". ")[0].replace("\n", " ").rstrip(".")


def fingerprint(model: nn.Module, processor: Any) -> str:
    """Returns 16 hex digits of what decides the answers.

    These are each tensor's name, shape and first and last 64 values, the configuration, and what
    the processor does to images, videos and texts.
    """
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        flat = tensor.detach().flatten()
        ends = torch.cat([flat[:64], flat[-64:]]).cpu().float()
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(ends.numpy().tobytes())
    is_vit = isinstance(processor, Inputs)
    parts = {"config": processor.config} if is_vit else _parts_of(cast(Any, model), processor)
    digest.update(json.dumps(parts, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]


def _parts_of(model: Any, processor: Any) -> dict[str, Any]:
    """Returns the configuration, and what the processor does."""
    tokenizer = deepcopy(getattr(processor.tokenizer, "backend_tokenizer", None))
    if tokenizer is not None:  # calls leave in it how they padded
        tokenizer.no_padding()
        tokenizer.no_truncation()
    videos = getattr(processor, "video_processor", None)
    config = model.config.to_diff_dict()
    for volatile in ("_name_or_path", "transformers_version"):
        config.pop(volatile, None)
    return {
        "config": config,
        "images": processor.image_processor.to_dict(),
        "videos": None if videos is None else videos.to_dict(),
        "template": processor.chat_template,
        "tokenizer": "" if tokenizer is None else tokenizer.to_str(),
    }


def directory(name: str) -> Path | None:
    """Returns the local directory that ``name`` means, or None for a hub id."""
    if name in names():
        return MODELS / name
    path = Path(os.path.expanduser(name))
    if path.is_dir():
        return path
    owner, slash, rest = name.partition("/")
    is_hub_id = (
        slash and owner not in ("", ".", "..") and owner[:1] != "~" and rest and "/" not in rest
    )
    if is_hub_id and not path.exists():
        return None
    if slash or path.exists():
        raise ConfigError(
            f"The model {name!r} is no directory. Give the directory of a saved model, a hub id "
            f"such as 'llava-hf/llava-1.5-7b-hf', or a shipped model: {', '.join(names())}."
        )
    raise unknown("model", name, names())


def _check_files(path: Path, listed: Iterable[str] = ()) -> None:
    kind = kind_of(path)
    parts = PARTS if kind is None else [(file,) for file in kind.FILES]
    missing = [file for file in listed if not (path / file).exists()]
    missing += [some[0] for some in parts if not any((path / file).exists() for file in some)]
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
