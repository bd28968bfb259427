"""A Qwen2.5-VL small enough to ship that watches clips: configuration, tokenizer and processor.

As mini-qwen, from which it starts, with the words of questions about clips behind its own. A visual
token covers 8 x 8 pixels of two frames, and a moment is one step of M-RoPE in time.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from vtprune.eval import clip_questions, mini_llava, mini_qwen
from vtprune.eval.mini_qwen import END, IMAGE, PIXELS, SPECIALS, START, VIDEO

CHAT_TEMPLATE = mini_qwen.CHAT_TEMPLATE.replace(
    "{% elif c['type'] == 'text' %}",
    f"{{% elif c['type'] == 'video' %}}{START}{VIDEO}{END} {{% elif c['type'] == 'text' %}}",
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Returns mini-qwen's tokenizer with more words; shared ones keep their ids."""
    words = clip_questions.vocabulary()
    return mini_llava.build_tokenizer(SPECIALS, IMAGE, [START, END, VIDEO], words)


def build_processor() -> Qwen2_5_VLProcessor:
    """Returns the processor: frames of 32 x 32 to 256 x 256 pixels."""
    return Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(**PIXELS),
        build_tokenizer(),
        Qwen2VLVideoProcessor(**PIXELS, cap_pixels_per_frame=False),
        chat_template=CHAT_TEMPLATE,
    )


def build_model(seed: int = 0) -> Qwen2_5_VLForConditionalGeneration:
    """Returns an untrained model (12 + 12 layers, 96 wide) in float32."""
    config: Any = mini_qwen.build_config(len(build_tokenizer()))
    config.vision_config.tokens_per_second = 1
    torch.manual_seed(seed)
    return Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation="sdpa")
