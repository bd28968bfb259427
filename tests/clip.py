"""A tiny CLIP with its tokenizer, for strategies that read its text tower."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CLIPConfig, CLIPModel

from tests import tiny

LENGTH, END = 6, 79


class ClipTokenizer:
    """Gives every word an id, between a first and a last token."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        words = (int.from_bytes(word.encode()) % 70 for word in text.split())
        return {"input_ids": [78, *words, END]}


def clip(width: int = 32) -> Any:
    """A random CLIP whose vision tower is so wide; of that only the end is read."""
    size = {"hidden_size": width, "intermediate_size": 48, "num_attention_heads": 4}
    vision = {**size, "num_hidden_layers": 1, "image_size": tiny.SIDE, "patch_size": tiny.PATCH}
    text = {**size, "num_hidden_layers": 2, "vocab_size": 80, "max_position_embeddings": LENGTH}
    ends = {"bos_token_id": 78, "eos_token_id": END, "pad_token_id": 0}
    torch.manual_seed(5)
    config = CLIPConfig(vision_config=vision, text_config={**text, **ends}, projection_dim=24)
    return CLIPModel._from_config(config).eval()
