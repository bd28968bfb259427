"""The words of a prompt that say what is asked about its images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_WORDS = "vtprune"  # stands for a user's words in a chat template


def instructions(ids: Tensor, valid: Tensor, visual: Tensor, processor: Any) -> list[Tensor]:
    """Returns the ids of the instruction of each sample, ``[M_b]`` int64.

    They are the words after the sample's last image, else all its words: tokens that are neither
    visual nor special. What the processor's chat template puts behind a user's words, such as
    ``ASSISTANT:``, is none of them.

    Args:
        ids: ``[B, L]`` prompt with placeholders; ``valid`` ``[B, L]`` bool marks real tokens.
        visual: ``[B, L]`` bool, placeholders.
    """
    tokenizer, closing = processor.tokenizer, _closing(processor)
    special = torch.tensor(list(tokenizer.all_special_ids), device=ids.device)
    words = valid & ~visual & ~torch.isin(ids, special)
    after = words & (visual.flip(1).cumsum(1).flip(1) == 0)
    found = []
    for row, tail, every in zip(ids, after, words, strict=True):
        asked = row[tail][: _n_asked(row[tail], tokenizer, closing)]
        if not len(asked):
            asked = row[every][: _n_asked(row[every], tokenizer, closing)]
        found.append(asked)
    return found


def _closing(processor: Any) -> str:
    """Returns what the chat template puts behind a user's words, without blanks and special tokens.

    Empty where there is no template.
    """
    if not getattr(processor, "chat_template", None):
        return ""
    message = {"role": "user", "content": [{"type": "text", "text": _WORDS}]}
    prompt = processor.apply_chat_template([message], add_generation_prompt=True)
    behind = prompt.rpartition(_WORDS)[2]
    for token in processor.tokenizer.all_special_tokens:
        behind = behind.replace(token, " ")
    return _dense(behind)


def _n_asked(words: Tensor, tokenizer: Any, closing: str) -> int:
    """Returns how many of ``words`` ``[M]`` come before ``closing``, if they end with it."""
    if not closing:
        return len(words)

    def behind(n: int) -> str:
        return _dense(tokenizer.decode(words[n:].tolist()))

    n = len(words)
    while n and len(behind(n - 1)) <= len(closing):
        n -= 1
    return n if behind(n) == closing else len(words)


def _dense(text: str) -> str:
    return "".join(text.split())
