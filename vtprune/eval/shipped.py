"""Loads a model with its processor: one shipped with this package, a directory, or a hub id."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

from vtprune.errors import ConfigError
from vtprune.registry import unknown

MODELS = Path(__file__).parent / "models"
DEFAULT = "mini-llava"
SUMS = "SHA256SUMS"  # written with sha256sum, checked on every load
UNSUMMED = {SUMS, "README.md", "training_log.jsonl"}
DTYPES = ("float32", "bfloat16", "float16", "auto")
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


def load(
    name: str = DEFAULT, device: str = "cpu", dtype: str = "float32"
) -> tuple[PreTrainedModel, Any]:
    """Returns the model in evaluation mode, and its processor.

    Args:
        name: a shipped model, the path of a local directory, or ``owner/name`` on the hub. The
            first two never touch the network.
        device: as torch names it.
        dtype: one of ``DTYPES``; ``auto`` is what the weights are saved in.

    Raises:
        ConfigError: there is no such device, dtype or model, its files are missing, damaged or do
            not fit, or those of a shipped model are not the ones that were shipped.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r} is not known; choose one of {', '.join(DTYPES)}.")
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
            source, dtype=dtype, output_loading_info=True, **where
        )
    except Exception as error:  # damaged files make transformers raise anything
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f"The model {name!r} cannot be loaded from {source}: {reason}") from error
    model, info = cast(Any, loaded)
    _check_weights(name, info["missing_keys"])
    try:
        return model.to(torch.device(device)).eval(), processor
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f"device={device!r} cannot be used: {reason}") from error


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


def fingerprint(model: PreTrainedModel, processor: Any) -> str:
    """Returns 16 hex digits of what decides the answers.

    These are each tensor's name, shape and first and last 64 values, the configuration, and what
    the processor does to images and texts.
    """
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        flat = tensor.detach().flatten()
        ends = torch.cat([flat[:64], flat[-64:]]).cpu().float()
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(ends.numpy().tobytes())
    tokenizer = deepcopy(getattr(processor.tokenizer, "backend_tokenizer", None))
    if tokenizer is not None:  # calls leave in it how they padded
        tokenizer.no_padding()
        tokenizer.no_truncation()
    parts = {
        "config": model.config.to_diff_dict(),
        "images": processor.image_processor.to_dict(),
        "template": processor.chat_template,
        "tokenizer": "" if tokenizer is None else tokenizer.to_str(),
    }
    for volatile in ("_name_or_path", "transformers_version"):
        parts["config"].pop(volatile, None)
    digest.update(json.dumps(parts, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]


def _directory(name: str) -> Path | None:
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
    missing = [file for file in listed if not (path / file).exists()]
    missing += [some[0] for some in PARTS if not any((path / file).exists() for file in some)]
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
