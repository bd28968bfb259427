"""LLaVAs of square images: as many visual tokens as the tower has patches, for every image."""

from __future__ import annotations

from typing import Any, Literal

from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    SiglipImageProcessor,
    SiglipVisionConfig,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
    VideoLlavaImageProcessor,
    VideoLlavaProcessor,
    VideoLlavaVideoProcessor,
)

from vtprune.eval.tiny._shared import chat_template, decoder, tokenizer, tower

_SIDE, _FRAME = 42, 28


def _crop(side: int) -> dict[str, Any]:
    return {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}


def _llava(vision: Any, images: Any, select: Literal["default", "full"]) -> tuple[Any, Any, Any]:
    words = tokenizer(image_token="<image>")
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**decoder(words)),
        image_token_index=words.image_token_id,
        vision_feature_select_strategy=select,
        image_seq_length=36,
    )
    processor = LlavaProcessor(
        images,
        words,
        patch_size=7,
        vision_feature_select_strategy=select,
        num_additional_image_tokens=int(select == "default"),
        chat_template=chat_template("<image>"),
    )
    return LlavaForConditionalGeneration, config, processor


def llava() -> tuple[Any, Any, Any]:
    """LLaVA-1.5: CLIP, its CLS token dropped after the last but one layer, 36 visual tokens."""
    return _llava(CLIPVisionConfig(**tower(_SIDE)), CLIPImageProcessor(**_crop(_SIDE)), "default")


def llava_siglip() -> tuple[Any, Any, Any]:
    """LLaVA on SigLIP, which has no CLS token: 36 visual tokens."""
    vision = SiglipVisionConfig(**tower(_SIDE), vision_use_head=False)
    images = SiglipImageProcessor(size={"height": _SIDE, "width": _SIDE})
    return _llava(vision, images, "full")


def video_llava() -> tuple[Any, Any, Any]:
    """Video-LLaVA: a tower for images, 16 tokens each; one for frames, 17 each with their CLS."""
    words = tokenizer(image_token="<image>", video_token="<video>")
    config = VideoLlavaConfig(
        vision_config=CLIPVisionConfig(**tower(_FRAME)),
        text_config=LlamaConfig(**decoder(words)),
        image_token_index=words.image_token_id,
        video_token_index=words.video_token_id,
        image_seq_length=16,
        video_seq_length=8 * 17,
    )
    processor = VideoLlavaProcessor(
        VideoLlavaImageProcessor(**_crop(_FRAME)),
        VideoLlavaVideoProcessor(**_crop(_FRAME)),
        words,
        patch_size=7,
        chat_template=chat_template("<image>", "<video>"),
    )
    return VideoLlavaForConditionalGeneration, config, processor
