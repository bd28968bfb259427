"""Qwen-VLs: images of any size, a fused-qkv tower with a 2 x 2 merger, M-RoPE, videos."""

from __future__ import annotations

from typing import Any

from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from vtprune.eval.tiny._shared import chat_template, decoder, tokenizer

_PATCH: dict[str, Any] = {"patch_size": 7, "temporal_patch_size": 2}
_TOWER: dict[str, Any] = {**_PATCH, "depth": 4, "num_heads": 4, "spatial_merge_size": 2}
# 4 to 36 visual tokens of 14 x 14 pixels an image.
_PIXELS: dict[str, Any] = {"shortest_edge": 28 * 28, "longest_edge": 84 * 84}
# Without it, transformers from 5.20 on warns that its default will change.
_VIDEO: dict[str, Any] = {**_PATCH, "merge_size": 2, "cap_pixels_per_frame": False}
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def _words() -> Any:
    return tokenizer(
        image_token="<|image_pad|>",
        video_token="<|video_pad|>",
        vision_start_token="<|vision_start|>",
        vision_end_token="<|vision_end|>",
    )


def _ids(words: Any) -> dict[str, Any]:
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return {name: getattr(words, name) for name in names}


def _decoder(words: Any, mrope: dict[str, Any], n_layers: int) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 10_000.0, **mrope}
    return {**decoder(words, n_layers), "rope_parameters": rope}


def _processor(cls: type, words: Any, videos: Any) -> Any:
    template = chat_template(
        "<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>"
    )
    images = Qwen2VLImageProcessor(size=_PIXELS, merge_size=2, **_PATCH)
    return cls(images, words, videos, chat_template=template)


def _qwen2_videos() -> Qwen2VLVideoProcessor:
    return Qwen2VLVideoProcessor(size=_PIXELS, **_VIDEO)


def qwen2_vl() -> tuple[Any, Any, Any]:
    """Qwen2-VL: full attention in all 4 blocks of the tower."""
    words = _words()
    config = Qwen2VLConfig(
        vision_config={**_TOWER, "embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2},
        text_config=_decoder(words, {"mrope_section": [1, 1, 2]}, 4),
        **_ids(words),
    )
    processor = _processor(Qwen2VLProcessor, words, _qwen2_videos())
    return Qwen2VLForConditionalGeneration, config, processor


def qwen2_5_vl() -> tuple[Any, Any, Any]:
    """Qwen2.5-VL: windows of 2 x 2 tokens and less, full attention in blocks 1 and 3 of 4."""
    words = _words()
    vision = {
        **_TOWER,
        "hidden_size": 32,
        "intermediate_size": 48,
        "out_hidden_size": 32,
        "window_size": 28,
        "fullatt_block_indexes": [1, 3],
    }
    config = Qwen2_5_VLConfig(
        vision_config=vision,
        text_config=_decoder(words, {"mrope_section": [1, 1, 2]}, 4),
        **_ids(words),
    )
    processor = _processor(Qwen2_5_VLProcessor, words, _qwen2_videos())
    return Qwen2_5_VLForConditionalGeneration, config, processor


def _qwen3(config: type, **extra: Any) -> tuple[Any, Any]:
    words = _words()
    vision = {
        **_TOWER,
        "hidden_size": 32,
        "intermediate_size": 48,
        "out_hidden_size": 32,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1, 2],
    }
    mrope = {"mrope_section": [2, 1, 1], "mrope_interleaved": True}
    text = {**_decoder(words, mrope, 6), "head_dim": 8, **extra}
    # Its limits are pixels of the whole video. The real one samples 2 frames a second.
    volume = {name: 8 * pixels for name, pixels in _PIXELS.items()}
    videos = Qwen3VLVideoProcessor(size=volume, do_sample_frames=False, **_VIDEO)
    processor = _processor(Qwen3VLProcessor, words, videos)
    return config(vision_config=vision, text_config=text, **_ids(words)), processor


def qwen3_vl() -> tuple[Any, Any, Any]:
    """Qwen3-VL: DeepStack after 3 of 6 decoder layers, a time stamp before each video frame."""
    return Qwen3VLForConditionalGeneration, *_qwen3(Qwen3VLConfig)


def qwen3_vl_moe() -> tuple[Any, Any, Any]:
    """Qwen3-VL with 2 of 4 experts for each token."""
    return Qwen3VLMoeForConditionalGeneration, *_qwen3(Qwen3VLMoeConfig, **_EXPERTS)
