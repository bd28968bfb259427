"""A LLaVA small enough to ship and to train from scratch: its configuration, tokenizer, processor.

Deep and narrow on purpose: published methods name layers of a 24-block tower and a 32-layer
language model, and such choices mean nothing in a shallow one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from vtprune.eval.scene_questions import vocabulary
from vtprune.eval.scene_things import SIZE

PATCH = 8
WIDTH = 96
HEADS = 3
GRID = SIZE // PATCH
SPECIALS = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
PREFIX = ["<s>", "user", ":"]
CHAT_TEMPLATE = (
    "{{ bos_token }} user : {% for m in messages %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image> {% elif c['type'] == 'text' %}{{ c['text'] }} "
    "{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}assistant :{% endif %}"
)


def build_tokenizer(
    specials: Sequence[str] = SPECIALS,
    image: str = "<image>",
    more: Sequence[str] = (),
    words: Sequence[str] = (),
) -> PreTrainedTokenizerFast:
    """Returns a tokenizer with one id per word of the scenes' questions, and one per digit.

    ``specials`` come first, ``more`` of them behind, then other ``words``; ``image`` marks a visual
    token.
    """
    words = [*specials, "user", "assistant", ":", *vocabulary(), *more, *words]
    model = WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Digits(individual_digits=True)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
    )
    fast.add_special_tokens({"extra_special_tokens": [image, *more]})
    return fast


def build_processor() -> LlavaProcessor:
    """Returns the processor: 128 x 128 images, 256 visual tokens."""
    image_processor = CLIPImageProcessor(
        size={"height": SIZE, "width": SIZE},
        do_center_crop=False,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return LlavaProcessor(
        image_processor,
        build_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(seed: int = 0) -> LlavaForConditionalGeneration:
    """Returns an untrained model (12 + 12 layers, 96 wide) in float32."""
    tokenizer = build_tokenizer()
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=12,
        num_attention_heads=HEADS,
        image_size=SIZE,
        patch_size=PATCH,
        hidden_act="gelu",
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=12,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=4096,
        bos_token_id=SPECIALS.index("<s>"),
        eos_token_id=SPECIALS.index("</s>"),
        pad_token_id=SPECIALS.index("<pad>"),
        tie_word_embeddings=False,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=SPECIALS.index("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=GRID * GRID,
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration._from_config(config, attn_implementation="sdpa")
    tower, llm = model.model.vision_tower, model.model.language_model
    _place_patches(tower.embeddings.position_embedding.weight)
    _look_at_alike([block.self_attn for block in tower.encoder.layers], std=0.1)
    _look_at_alike([block.self_attn for block in llm.layers], std=0.06)
    return model


@torch.no_grad()
def _place_patches(table: Tensor) -> None:
    """Starts the tower's positions ``[1 + N, D]`` as sines of row and column, so near is alike."""
    width = table.shape[1] // 4
    freq = torch.exp(torch.arange(width) * (-math.log(100.0) / width))
    angle = torch.arange(GRID)[:, None] * freq  # [GRID, width]
    wave = torch.cat([angle.sin(), angle.cos()], dim=1)
    rows, cols = wave[:, None].expand(-1, GRID, -1), wave[None].expand(GRID, -1, -1)
    table[1:] = 0.3 * torch.cat([rows, cols], dim=-1).flatten(0, 1)


@torch.no_grad()
def _look_at_alike(attentions: Iterable[Any], std: float) -> None:
    """Starts attention with equal query and key projections, so that like looks at like.

    Mimetic initialisation (Trockman and Kolter 2023); it spares a small model the long plateau
    before it learns to look anywhere in particular.
    """
    for attention in attentions:
        nn.init.normal_(attention.q_proj.weight, std=std)
        attention.k_proj.weight.copy_(attention.q_proj.weight)
