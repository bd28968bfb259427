"""Models with random weights: real shapes to be timed, without a checkpoint.

``configs`` has what the ``config.json`` of published checkpoints says of shapes, one file each.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from vtprune.errors import ConfigError
from vtprune.eval.bench_model_inputs import FAMILIES
from vtprune.registry import unknown

CONFIGS = Path(__file__).parent / "configs"


def config_names() -> list[str]:
    """Returns the names of the shipped configurations."""
    return sorted(path.stem for path in CONFIGS.glob("*.json"))


def read_config(name: str) -> Any:
    """Returns the configuration of that name, or of a file such as ``path/to/config.json``.

    Raises:
        ConfigError: there is none, it is damaged, or of a family whose inputs cannot be made.
    """
    file = CONFIGS / f"{name}.json" if name in config_names() else Path(name)
    if not file.is_file():
        raise unknown("configuration", name, config_names())
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
        family = said.pop("model_type")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ConfigError(f"{file} is no config.json: it is no JSON with a model_type.") from error
    if family not in FAMILIES:
        raise ConfigError(
            f"{file} is of model_type {family!r}, whose inputs cannot be made without a processor."
            f" Give one of {', '.join(FAMILIES)}, or time a checkpoint: vtprune bench MODEL."
        )
    try:
        return AutoConfig.for_model(family, **said)
    except Exception as error:  # a bad value makes transformers raise anything
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f"{file} makes no {family} configuration: {reason}") from error


def random_model(name: str, device: torch.device, dtype: str, attention: str = "sdpa") -> Any:
    """Returns a model in evaluation mode, built on the device in that dtype.

    Weights are as transformers initializes them, from seed 0; it generates no placeholder.

    Raises:
        ConfigError: as ``read_config``, or there is no such attention, or too little memory.
    """
    config, gpus = read_config(name), [device] if device.type == "cuda" else []
    kwargs = {"dtype": getattr(torch, dtype), "attn_implementation": attention}
    try:
        with torch.random.fork_rng(gpus), device:
            torch.manual_seed(0)
            model = AutoModelForImageTextToText.from_config(config, **kwargs)
    except (ImportError, ValueError, torch.OutOfMemoryError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f"{name} cannot be built on {device} in {dtype}: {reason}") from error
    placeholders = {"image_token_id", "video_token_id"}
    known = [getattr(config, key) for key in sorted(placeholders) if hasattr(config, key)]
    model.generation_config.suppress_tokens = known
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model.eval()
