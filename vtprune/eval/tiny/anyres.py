"""LLaVAs that cut an image into tiles: base image, tiles unpadded into one grid, newlines."""

from __future__ import annotations

from typing import Any

from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    LlavaNextVideoProcessor,
    LlavaNextVideoVideoProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    Qwen2Config,
    SiglipVisionConfig,
)

from vtprune.eval.tiny._shared import chat_template, decoder, tokenizer, tower

_TILE = 28
_PINPOINTS = [[h * _TILE, w * _TILE] for h, w in [(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)]]
_CROP: dict[str, Any] = {
    "size": {"shortest_edge": _TILE},
    "crop_size": {"height": _TILE, "width": _TILE},
}
_CLIP: dict[str, Any] = {
    "patch_size": 7,
    "vision_feature_select_strategy": "default",
    "num_additional_image_tokens": 1,
}
# 5 x 5 patches: an odd number, like the real 27 x 27, so that pooled frames have a ragged edge.
_ODD_TILE = 35
_UP_TO_4X4 = [[h * _ODD_TILE, w * _ODD_TILE] for h in range(1, 5) for w in range(1, 5)]


def _next(words: Any) -> dict[str, Any]:
    """Returns what the configurations of LLaVA-NeXT and of its video model share."""
    return {
        "vision_config": CLIPVisionConfig(**tower(_TILE)),
        "text_config": LlamaConfig(**decoder(words)),
        "image_token_index": words.image_token_id,
        "image_grid_pinpoints": _PINPOINTS,
        "image_seq_length": 16,
    }


def llava_next() -> tuple[Any, Any, Any]:
    """LLaVA-NeXT: CLIP with CLS, 16 tokens a tile, up to 4 tiles and the base image."""
    words = tokenizer(image_token="<image>")
    processor = LlavaNextProcessor(
        LlavaNextImageProcessor(**_CROP, image_grid_pinpoints=_PINPOINTS),
        words,
        **_CLIP,
        chat_template=chat_template("<image>"),
    )
    return LlavaNextForConditionalGeneration, LlavaNextConfig(**_next(words)), processor


def llava_next_video() -> tuple[Any, Any, Any]:
    """LLaVA-NeXT-Video: images as in LLaVA-NeXT, frames average-pooled to 4 tokens each."""
    words = tokenizer(image_token="<image>", video_token="<video>")
    config = LlavaNextVideoConfig(**_next(words), video_token_index=words.video_token_id)
    processor = LlavaNextVideoProcessor(
        LlavaNextVideoVideoProcessor(**_CROP),
        LlavaNextImageProcessor(**_CROP, image_grid_pinpoints=_PINPOINTS),
        words,
        **_CLIP,
        chat_template=chat_template("<image>", "<video>"),
    )
    return LlavaNextVideoForConditionalGeneration, config, processor


def llava_onevision() -> tuple[Any, Any, Any]:
    """LLaVA-OneVision: SigLIP, 25 tokens a tile, up to 16 tiles shrunk to the area of 9, video."""
    words = tokenizer(image_token="<image>", video_token="<video>")
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**tower(_ODD_TILE), vision_use_head=False),
        text_config=Qwen2Config(**decoder(words)),
        image_token_index=words.image_token_id,
        video_token_index=words.video_token_id,
        image_grid_pinpoints=_UP_TO_4X4,
        vision_aspect_ratio="anyres_max_9",
    )
    size = {"height": _ODD_TILE, "width": _ODD_TILE}
    processor = LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=_UP_TO_4X4),
        words,
        LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=25,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9",
        chat_template=chat_template("<image>", "<video>"),
    )
    return LlavaOnevisionForConditionalGeneration, config, processor
