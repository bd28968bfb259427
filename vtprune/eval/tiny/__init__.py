"""Tiny random models of every family with their real processors, built offline in milliseconds.

They answer nonsense, but have everything their large relatives have: the layout of the visual
tokens, the placeholders in the prompt, the shape of the vision tower and of the decoder.
"""

from __future__ import annotations

import importlib
from typing import Any

from vtprune import registry
from vtprune.eval.tiny._weights import random_model

_FILES = {
    "gemma3": "gemma",
    "idefics3": "idefics",
    "internvl": "internvl",
    "llava": "llava",
    "llava_next": "anyres",
    "llava_next_video": "anyres",
    "llava_onevision": "anyres",
    "llava_siglip": "llava",
    "mistral3": "mistral3",
    "paligemma": "gemma",
    "qwen2_5_vl": "qwen",
    "qwen2_vl": "qwen",
    "qwen3_vl": "qwen",
    "qwen3_vl_moe": "qwen",
    "smolvlm": "idefics",
    "video_llava": "llava",
}


def names() -> list[str]:
    """Returns the families that ``build`` knows."""
    return sorted(_FILES)


def build(family: str, attention: str = "sdpa", seed: int = 0, **settings: Any) -> tuple[Any, Any]:
    """Returns a tiny random model of that family, and its processor.

    Args:
        family: One of ``names()``.
        attention: transformers' ``attn_implementation``.
        seed: Seed of the weights.
        settings: Settings that only this family has, such as ``sliding_window`` of gemma3.

    Raises:
        ConfigError: there is no tiny model of that family.
    """
    if family not in _FILES:
        raise registry.unknown("tiny model", family, names())
    module = importlib.import_module(f"{__name__}.{_FILES[family]}")
    cls, config, processor = getattr(module, family)(**settings)
    model = random_model(cls, config, attention, seed)
    words, generation = processor.tokenizer, model.generation_config
    # A generated placeholder would ask for an image, and an end would cut comparisons short.
    added = words.added_tokens_decoder.items()
    generation.suppress_tokens = sorted(i for i, token in added if token.special)
    generation.eos_token_id, generation.pad_token_id = None, words.pad_token_id
    return model.eval(), processor
