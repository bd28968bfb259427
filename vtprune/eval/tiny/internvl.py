"""InternVL: square tiles and a thumbnail, a CLS token, 2 x 2 patches shuffled into one token."""

from __future__ import annotations

from typing import Any

from transformers import (
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    Qwen2Config,
)

from vtprune.eval.tiny._shared import chat_template, decoder, tokenizer, tower

_TILE = 42


def internvl() -> tuple[Any, Any, Any]:
    """InternVL: 9 tokens a tile, up to 4 tiles and a thumbnail, one tile a video frame."""
    words = tokenizer(
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    config = InternVLConfig(
        vision_config={**tower(_TILE), "layer_scale_init_value": 0.5},
        text_config=Qwen2Config(**decoder(words)),
        image_token_id=words.context_image_token_id,
        image_seq_length=9,
        tie_word_embeddings=False,
    )
    size = {"height": _TILE, "width": _TILE}
    processor = InternVLProcessor(
        GotOcr2ImageProcessor(size=size, crop_to_patches=True, max_patches=4),
        words,
        InternVLVideoProcessor(size=size),
        image_seq_length=9,
        chat_template=chat_template("<IMG_CONTEXT>", "<video>"),
    )
    return InternVLForConditionalGeneration, config, processor
