"""Idefics3 and SmolVLM: an image is cut into rows of tiles, each named by a token before it."""

from __future__ import annotations

from typing import Any

from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    LlamaConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)

from vtprune.eval.tiny._shared import chat_template, decoder, tokenizer, tower

_TILES = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]


def _words(**named: str) -> Any:
    around = ["<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
    return tokenizer("<|im_start|>", *around, *_TILES, image_token="<image>", **named)


def _sizes(tile: int, words: Any, scale: int) -> dict[str, Any]:
    return {
        "vision_config": tower(tile),
        "text_config": LlamaConfig(**decoder(words)),
        "image_token_id": words.image_token_id,
        "pad_token_id": words.pad_token_id,
        "scale_factor": scale,
    }


def _edges(tile: int, n_tiles: int) -> dict[str, Any]:
    return {"size": {"longest_edge": n_tiles * tile}, "max_image_size": {"longest_edge": tile}}


def idefics3() -> tuple[Any, Any, Any]:
    """Idefics3: tiles of 42 pixels, 2 x 2 patches a token, up to 2 x 2 tiles and the image."""
    words = _words()
    processor = Idefics3Processor(
        Idefics3ImageProcessor(**_edges(42, 2)),
        words,
        image_seq_len=9,
        chat_template=chat_template("<image>"),
    )
    return Idefics3ForConditionalGeneration, Idefics3Config(**_sizes(42, words, 2)), processor


def smolvlm() -> tuple[Any, Any, Any]:
    """SmolVLM: tiles of 63 pixels, 3 x 3 patches a token; its frames are images in the prompt.

    Raises:
        ImportError: num2words, which its processor needs, is not installed.
    """
    words = _words(video_token="<video>")
    processor = SmolVLMProcessor(
        SmolVLMImageProcessor(**_edges(63, 2)),
        words,
        SmolVLMVideoProcessor(**_edges(63, 1)),
        image_seq_len=9,
        chat_template=chat_template("<image>", "<video>"),
    )
    return SmolVLMForConditionalGeneration, SmolVLMConfig(**_sizes(63, words, 3)), processor
