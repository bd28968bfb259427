"""A Qwen2.5-VL small enough to ship: its configuration, tokenizer and processor.

As wide and deep as mini-llava, and with its words at the same ids, so that it can start from that
model's language model. A visual token covers 8 x 8 pixels at any size of image.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from vtprune.eval import mini_llava
from vtprune.eval.mini_llava import HEADS, WIDTH

PATCH = 4
MERGE = 2
TOKEN = PATCH * MERGE  # pixels that a visual token covers, each way
WINDOW = 32  # pixels
PIXELS: dict[str, Any] = {
    "patch_size": PATCH,
    "merge_size": MERGE,
    "temporal_patch_size": 2,
    "size": {"shortest_edge": 32 * 32, "longest_edge": 256 * 256},
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
}
IMAGE, VIDEO = "<|image_pad|>", "<|video_pad|>"
START, END = "<|vision_start|>", "<|vision_end|>"
SPECIALS = [IMAGE if word == "<image>" else word for word in mini_llava.SPECIALS]
PREFIX = ["<s>", "user", ":", START]
CHAT_TEMPLATE = mini_llava.CHAT_TEMPLATE.replace("<image>", f"{START}{IMAGE}{END}")


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Returns mini-llava's tokenizer with Qwen's marks of vision; shared words keep their ids."""
    return mini_llava.build_tokenizer(SPECIALS, IMAGE, [START, END, VIDEO])


def build_processor() -> Qwen2_5_VLProcessor:
    """Returns the processor: images of any size from 32 x 32 to 256 x 256 pixels."""
    return Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(**PIXELS),
        build_tokenizer(),
        Qwen2VLVideoProcessor(**PIXELS),
        chat_template=CHAT_TEMPLATE,
    )


def build_model(seed: int = 0) -> Qwen2_5_VLForConditionalGeneration:
    """Returns an untrained model (12 + 12 layers, 96 wide) in float32."""
    torch.manual_seed(seed)
    return Qwen2_5_VLForConditionalGeneration._from_config(
        build_config(), attn_implementation="sdpa"
    )


def build_config(words: int | None = None) -> Qwen2_5_VLConfig:
    """Returns the configuration; ``words`` in its vocabulary, None = those of the tokenizer."""
    ids = build_tokenizer().get_vocab()
    return Qwen2_5_VLConfig(
        vision_config=_vision(),
        text_config=_text(ids, len(ids) if words is None else words),
        image_token_id=ids[IMAGE],
        video_token_id=ids[VIDEO],
        vision_start_token_id=ids[START],
        vision_end_token_id=ids[END],
        tie_word_embeddings=False,
    )


def _vision() -> dict[str, Any]:
    return {
        "depth": 12,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_heads": HEADS,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
        "window_size": WINDOW,
        "out_hidden_size": WIDTH,
        "fullatt_block_indexes": [2, 5, 8, 11],
    }


def _text(ids: dict[str, int], words: int) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    return {
        "vocab_size": words,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 12,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_parameters": rope,
        "bos_token_id": ids["<s>"],
        "eos_token_id": ids["</s>"],
        "pad_token_id": ids["<pad>"],
    }
