"""Contrastive decoding without a cache, a batch or a second branch: every prompt anew per token."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from contextvars import Context
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

import vtprune
from tests.families import batches, prompts
from tests.families.oracles import model_of

PER_TOKEN = ("attention_mask", "mm_token_type_ids", "token_type_ids")


def conversations(seed: int = 0) -> list[prompts.Conversation]:
    """Two prompts of different lengths, with one and two images."""
    return prompts._KINDS["ragged"](seed)


def whole(family: str, seed: int = 0) -> batches.Batch:
    return batches.of(model_of(family)[1], *conversations(seed))


def alone(family: str, seed: int = 0) -> list[batches.Batch]:
    """The same prompts, each by itself and without padding."""
    processor = model_of(family)[1]
    return [batches.of(processor, one) for one in conversations(seed)]


def extended(single: batches.Batch, text: Tensor) -> batches.Batch:
    """A prompt and, after it, the text ``[t]``."""
    more = dict(single)
    more["input_ids"] = torch.cat([single["input_ids"], text[None]], dim=1)
    for name in PER_TOKEN:
        if name in single:
            fill = single[name].new_full((1, len(text)), name == "attention_mask")
            more[name] = torch.cat([single[name], fill], dim=1)
    return more


@torch.no_grad()
def next_logits(model: Any, single: batches.Batch, text: Tensor, wrap: Any = None) -> Tensor:
    """Logits ``[V]`` after a prompt and a text, of the model as it is or wrapped."""
    context = nullcontext() if wrap is None else vtprune.wrap(model, **wrap)
    with context:
        return model(**extended(single, text), use_cache=False).logits[0, -1].float()


@dataclass
class Slow(LogitsProcessor):
    """What the decoder under test should make of the scores; ``length`` of the padded prompts."""

    model: Any
    length: int
    singles: Sequence[batches.Batch]
    wrap: Any
    alpha: float
    beta: float
    sign: int

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        copies, made = len(input_ids) // len(self.singles), []
        for row, (text, full) in enumerate(zip(input_ids[:, self.length :], scores, strict=True)):
            given = self.model, self.singles[row // copies], text, self.wrap
            view = Context().run(next_logits, *given)  # hooks of a wrapped run stay out of it
            added = view if self.sign > 0 else full - view
            mixed = (full + self.alpha * added).log_softmax(-1)
            likely = full.softmax(-1)
            made.append(mixed.where(likely >= self.beta * likely.max(), -torch.inf))
        return torch.stack(made)
