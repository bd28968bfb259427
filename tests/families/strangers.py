"""Tiny models of families without an adapter, and inputs made by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor

from vtprune.eval.tiny._weights import random_model

IMAGE, VIDEO, PAD, WORDS = 98, 97, 0, 90
Made = tuple[Any, Any, dict[str, Any], int]
_TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
}
_TEXT: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _pixels(n: int) -> Tensor:
    return torch.randn(n, 3, 28, 28, generator=torch.Generator().manual_seed(1))


def vipllava() -> Made:
    """Features of several CLIP layers side by side: 16 tokens an image."""
    config = hf.VipLlavaConfig(
        vision_config=hf.CLIPVisionConfig(**_TOWER),
        text_config=hf.LlamaConfig(**_TEXT),
        image_token_index=IMAGE,
        vision_feature_layer=(-2, -1),
    )
    return hf.VipLlavaForConditionalGeneration, config, {"pixel_values": _pixels(3)}, 16


def aya_vision() -> Made:
    """SigLIP, 2 x 2 patches a token; some layers of the decoder see a sliding window."""
    config = hf.AyaVisionConfig(
        vision_config=hf.SiglipVisionConfig(**_TOWER, vision_use_head=False),
        text_config=hf.Cohere2Config(**_TEXT, sliding_window=256),
        image_token_index=IMAGE,
        tie_word_embeddings=False,
    )
    return hf.AyaVisionForConditionalGeneration, config, {"pixel_values": _pixels(3)}, 4


def got_ocr2() -> Made:
    """SAM's tower with a convolutional neck: 4 tokens an image."""
    vision = {
        "hidden_size": 32,
        "output_channels": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 128,
        "patch_size": 16,
        "window_size": 2,
        "global_attn_indexes": [1],
        "mlp_dim": 48,
    }
    config = hf.GotOcr2Config(
        vision_config=vision, text_config=hf.Qwen2Config(**_TEXT), image_token_index=IMAGE
    )
    pixels = torch.randn(3, 3, 128, 128, generator=torch.Generator().manual_seed(1))
    return hf.GotOcr2ForConditionalGeneration, config, {"pixel_values": pixels}, 4


def glm4v() -> Made:
    """GLM-4V: position ids with three axes, 4 tokens an image."""
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 1, 1]}
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "num_heads": 4,
        "out_hidden_size": 32,
        "intermediate_size": 48,
        "image_size": 28,
        "patch_size": 7,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    text = {k: v for k, v in _TEXT.items() if k not in ("bos_token_id", "eos_token_id")}
    config = hf.Glm4vConfig(
        vision_config=vision,
        text_config={**text, "rope_parameters": {**rope, "partial_rotary_factor": 1.0}},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_start_token_id=96,
        image_end_token_id=95,
        video_start_token_id=94,
        video_end_token_id=93,
    )
    patches = torch.randn(48, 3 * 2 * 49, generator=torch.Generator().manual_seed(1))
    extra = {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, 4, 4]] * 3)}
    return hf.Glm4vForConditionalGeneration, config, extra, 4


def idefics2() -> Made:
    """A perceiver resamples each image to 8 tokens; a row of the batch is one entry."""
    config = hf.Idefics2Config(
        vision_config={k: v for k, v in _TOWER.items()},
        perceiver_config={
            "hidden_size": 32,
            "resampler_n_latents": 8,
            "resampler_depth": 1,
            "resampler_n_heads": 4,
            "num_key_value_heads": 2,
            "resampler_head_dim": 8,
        },
        text_config=hf.MistralConfig(**_TEXT, head_dim=8, sliding_window=None),
        image_token_id=IMAGE,
    )
    pixels = torch.zeros(2, 2, 3, 28, 28)
    pixels[0, 0], pixels[1] = _pixels(1)[0], _pixels(2)
    return hf.Idefics2ForConditionalGeneration, config, {"pixel_values": pixels}, 8


BUILD: dict[str, Callable[[], Made]] = {
    f.__name__: f for f in (vipllava, aya_vision, got_ocr2, glm4v, idefics2)
}


def build(name: str, attention: str = "") -> tuple[Any, dict[str, Any], int]:
    """Returns model, left-padded inputs of two rows with one and two images, tokens an image."""
    cls, config, visual, n = BUILD[name]()
    attention = attention or ("eager" if name == "got_ocr2" else "sdpa")  # it has no other
    model = random_model(cls, config, attention, 0).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, PAD
    model.generation_config.suppress_tokens = [PAD, 1, 2, *range(WORDS, 99)]
    random = torch.Generator().manual_seed(7)

    def words(count: int) -> list[int]:
        return torch.randint(3, WORDS, (count,), generator=random).tolist()

    picture = [IMAGE] * n
    rows = [words(3) + picture + words(6), words(2) + picture + words(3) + picture + words(4)]
    length = max(map(len, rows))
    ids = torch.tensor([[PAD] * (length - len(row)) + row for row in rows])
    inputs = {"input_ids": ids, "attention_mask": (ids != PAD).long(), **visual}
    if "image_grid_thw" in visual:
        inputs["mm_token_type_ids"] = (ids == IMAGE).long()
    return model, inputs, n
