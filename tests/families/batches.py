"""Batches of the families' tests, rows of them alone, and what a decode loop needs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.families import prompts

Batch = dict[str, Tensor]


def batch(processor: Any, kind: str) -> Batch:
    """Returns the inputs of this kind without labels."""
    return _without_labels(prompts.inputs(processor, kind))


def of(processor: Any, *conversations: prompts.Conversation) -> Batch:
    """Returns the left-padded inputs of these conversations."""
    made = processor.apply_chat_template(
        list(conversations),
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
        processor_kwargs={"padding": True},
    )
    return _without_labels(dict(made))


def _without_labels(inputs: dict[str, Tensor]) -> Batch:
    return {name: value for name, value in inputs.items() if name != "labels"}


def converted(inputs: Batch, dtype: torch.dtype) -> Batch:
    """Returns the inputs with pixels of this type."""
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}


def new_ids(model: Any, inputs: Batch, n: int = 5, **options: Any) -> Tensor:
    """Returns the ``n`` ids that follow the prompt, greedily unless told otherwise."""
    out = model.generate(**inputs, max_new_tokens=n, **{"do_sample": False, **options})
    length = inputs["input_ids"].shape[1]
    prompt = inputs["input_ids"].repeat_interleave(len(out) // len(inputs["input_ids"]), dim=0)
    assert torch.equal(out[:, :length], prompt), "the caller's prompt comes first"
    return out[:, length:]


@torch.no_grad()
def decoded(model: Any, inputs: Batch, n: int = 5, given: int | None = None) -> Tensor:
    """Returns the ids of a decode loop as users write it; from step ``given`` on without mask."""
    mask, ids = inputs["attention_mask"], []
    barred = torch.tensor(model.generation_config.suppress_tokens)
    out = model(**inputs, use_cache=True)
    for step in range(n):
        ids.append(out.logits[:, -1].index_fill(1, barred, -float("inf")).argmax(-1))
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        out = model(
            input_ids=ids[-1][:, None],
            past_key_values=out.past_key_values,
            attention_mask=None if given is not None and step >= given else mask,
        )
    return torch.stack(ids, dim=1)
