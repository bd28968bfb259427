"""Mistral3: Pixtral's tower with 2-D RoPE, images of any size, a token at the end of each row."""

from __future__ import annotations

from typing import Any

from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralImageProcessor,
    PixtralProcessor,
    PixtralVisionConfig,
)

from vtprune.eval.tiny._shared import chat_template, decoder, tokenizer, tower


def mistral3() -> tuple[Any, Any, Any]:
    """Mistral3: 2 x 2 patches a token, up to 6 x 6 of them, rows parted by ``[IMG_BREAK]``."""
    words = tokenizer("[IMG]", "[IMG_BREAK]", "[IMG_END]")
    config = Mistral3Config(
        vision_config=PixtralVisionConfig(**tower(84)),
        text_config=MistralConfig(**decoder(words), head_dim=8, sliding_window=None),
        image_token_index=words.convert_tokens_to_ids("[IMG]"),
        tie_word_embeddings=False,
    )
    processor = PixtralProcessor(
        PixtralImageProcessor(size={"longest_edge": 84}, patch_size=7),
        words,
        patch_size=7,
        spatial_merge_size=2,
        chat_template=chat_template("[IMG]"),
    )
    return Mistral3ForConditionalGeneration, config, processor
