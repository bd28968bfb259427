"""Google's: SigLIP towers, and decoders in which the tokens of an image see each other.

The real ones tie the output to the embeddings; a random decoder that did would only repeat words.
"""

from __future__ import annotations

from typing import Any

from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessor,
    Gemma3Processor,
    Gemma3TextConfig,
    GemmaConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    SiglipImageProcessor,
    SiglipVisionConfig,
)

from vtprune.eval.tiny._shared import chat_template, decoder, tokenizer, tower

_SIDE = 42
_SIZE = {"height": _SIDE, "width": _SIDE}


def gemma3(sliding_window: int = 512) -> tuple[Any, Any, Any]:
    """Gemma3: 36 patches pooled to 9 tokens, decoder layers 0, 1 and 3 with a sliding window.

    Args:
        sliding_window: Tokens that these layers see; the default is more than any test prompt.
    """
    words = tokenizer(
        boi_token="<start_of_image>", eoi_token="<end_of_image>", image_token="<image_soft_token>"
    )
    text = Gemma3TextConfig(
        **decoder(words),
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=sliding_window,
        layer_types=["sliding_attention"] * 2 + ["full_attention", "sliding_attention"],
    )
    config = Gemma3Config(
        vision_config=SiglipVisionConfig(**tower(_SIDE), vision_use_head=False),
        text_config=text,
        mm_tokens_per_image=9,
        boi_token_index=words.boi_token_id,
        eoi_token_index=words.eoi_token_id,
        image_token_index=words.image_token_id,
        tie_word_embeddings=False,
    )
    processor = Gemma3Processor(
        Gemma3ImageProcessor(size=_SIZE),
        words,
        chat_template=chat_template("<start_of_image>"),
        image_seq_length=9,
    )
    return Gemma3ForConditionalGeneration, config, processor


def paligemma() -> tuple[Any, Any, Any]:
    """PaliGemma: 36 tokens an image, the whole prompt seen from everywhere in it."""
    words = tokenizer(image_token="<image>")
    # Its processor puts <bos> after the images, and adds 1152 tokens for places to the words.
    template = chat_template("<image>").removeprefix("{{ bos_token }}")
    processor = PaliGemmaProcessor(
        SiglipImageProcessor(size=_SIZE, image_seq_length=36), words, chat_template=template
    )
    config = PaliGemmaConfig(
        vision_config=SiglipVisionConfig(**tower(_SIDE), vision_use_head=False),
        text_config=GemmaConfig(**decoder(words), head_dim=8),
        image_token_index=words.image_token_id,
        projection_dim=32,
        hidden_size=32,
        tie_word_embeddings=False,
    )
    return PaliGemmaForConditionalGeneration, config, processor
