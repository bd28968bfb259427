"""What the tiny models share: words, a chat template, the sizes of tower and decoder."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

_BASE = ["<pad>", "<s>", "</s>", "<unk>"]
_WORDS = """
a all an and any are assistant at ball bird black blue box brown car cat circle color colour cup
describe detail dog does few first frame gray green happens has he how i image images in is it
large left look many me more most of on one or orange photo picture pink please purple question
red right round say second seconds see shape shapes she short show small square star system that
the there these they thing this three triangle two user video what when where which white who with
word write yellow yes you no . , : ; ? ! - < > ( ) 0 1 2 3 4 5 6 7 8 9
"""
_IDS = {word: i for i, word in enumerate(_BASE + _WORDS.split())}

_TEMPLATE = """{{ bos_token }}{% for message in messages %}{{ message['role'] }} :
{% if message['content'] is string %}{{ message['content'] }}
{% else %}{% for part in message['content'] %}\
{% if part['type'] == 'image' %}IMAGE
{% elif part['type'] == 'video' %}VIDEO
{% else %}{{ part['text'] }}
{% endif %}{% endfor %}{% endif %}{% endfor %}\
{% if add_generation_prompt %}assistant :{% endif %}"""


def chat_template(image: str, video: str = "") -> str:
    """Returns a template for texts, images and videos, with these markers of a family."""
    return _TEMPLATE.replace("IMAGE", image).replace("VIDEO", video)


def tokenizer(*special: str, **named: str) -> Any:
    """Returns a tokenizer of whole words that pads on the left.

    Args:
        special: Special tokens of the family.
        named: More of them, which processors look up by name: ``image_token="<image>"``.
    """
    words: Any = Tokenizer(models.WordLevel(_IDS, unk_token="<unk>"))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Punctuation(),
            pre_tokenizers.Digits(individual_digits=True),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        extra_special_tokens=list(special) + list(named.values()),
        model_specific_special_tokens=named,
    )


def tower(image_size: int, patch_size: int = 7) -> dict[str, Any]:
    """Returns the sizes of every tower of square images: 4 layers of 4 heads, 32 wide."""
    return {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": image_size,
        "patch_size": patch_size,
    }


def decoder(words: Any, n_layers: int = 4) -> dict[str, Any]:
    """Returns the sizes of every decoder: 4 heads with 2 for keys and values, 32 wide."""
    return {
        "vocab_size": len(words),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": n_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "pad_token_id": words.pad_token_id,
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
    }
