"""The configuration of a LLaVA of 36 visual tokens, as ``--random-weights`` reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TINY: dict[str, Any] = {
    "model_type": "llava",
    "image_token_index": 99,
    "image_seq_length": 36,
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "text_config": {
        "model_type": "llama",
        "vocab_size": 100,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": 42,
        "patch_size": 7,
    },
}


def write_tiny(folder: Path) -> str:
    """Returns the path of the file."""
    file = folder / "tiny.json"
    file.write_text(json.dumps(TINY), encoding="utf-8")
    return str(file)
