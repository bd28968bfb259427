"""Edited attention by its definition: transformers' eager attention, whole matrices, no cache."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

# Of a layer's number, logits or attention [B, H, Q, K] and what entered the layer [B, Q, D].
Change = Callable[[int, Tensor, Tensor], Tensor]
# Of a layer's number, queries, keys and values of all heads [B, H, L, d]: what attention gives.
Whole = Callable[[int, Tensor, Tensor, Tensor, Tensor], Tensor]


@contextmanager
def changed(
    layers: Any, *, logits: Change | None = None, weights: Change | None = None, whole: Any = None
) -> Iterator[None]:
    """Lets eager attention of ``layers`` be changed before or after the softmax, or as a whole."""
    entered: dict[int, Tensor] = {}
    numbers = {layer.self_attn: number for number, layer in enumerate(layers)}
    home = sys.modules[type(layers[0].self_attn).__module__]
    original = home.eager_attention_forward

    def keep(number: int) -> Callable[..., None]:
        def before(module: Any, args: Any, kwargs: Any) -> None:
            entered[number] = args[0] if args else kwargs["hidden_states"]

        return before

    def attend(module: Any, *given: Any, **kwargs: Any) -> Any:
        number = numbers.get(module)
        if number is None:
            return original(module, *given, **kwargs)
        q, k, v, mask = given[:4]
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        scores = q @ k.mT * kwargs["scaling"] + mask[..., : k.shape[2]]
        if whole is not None:
            return whole(number, q, k, v, scores).transpose(1, 2).contiguous(), None
        if logits is not None:
            scores = logits(number, scores, entered[number])
        shares = scores.softmax(-1)
        if weights is not None:
            shares = weights(number, shares, entered[number])
        return (shares @ v).transpose(1, 2).contiguous(), None

    hooks = [
        layer.register_forward_pre_hook(keep(number), with_kwargs=True)
        for number, layer in enumerate(layers)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(home, "eager_attention_forward", attend)
        yield
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def greedy(model: Any, inputs: Mapping[str, Tensor], steps: int) -> tuple[Tensor, Tensor]:
    """Returns new ids ``[B, steps]`` and their logits, each from the whole sequence anew."""
    batch, ids, logits = dict(inputs), [], []
    barred = torch.tensor(model.generation_config.suppress_tokens)
    more = {"input_ids": None, "attention_mask": 1, "mm_token_type_ids": 0}
    for _ in range(steps):
        logits.append(model(**batch, use_cache=False).logits[:, -1])
        ids.append(logits[-1].index_fill(1, barred, -torch.inf).argmax(-1))
        for name, value in more.items():
            if name in batch:
                new = ids[-1] if value is None else torch.full_like(ids[-1], value)
                batch[name] = torch.cat([batch[name], new[:, None].to(batch[name])], dim=1)
    return torch.stack(ids, 1), torch.stack(logits, 1)
