"""Attention masks for some queries of a prompt, or with a window in them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vtprune.engine.cuts import additive


def explicit(
    mask: Tensor | None, module: Any, query: Tensor, key: Tensor, kwargs: Mapping[str, Any]
) -> Tensor:
    """Returns the mask ``[., ., L, keys]``; where there is none, what is seen then.

    Of more keys than queries sdpa without a mask takes as many as there are queries, the first. So
    fewer queries than the prompt has need one.
    """
    if mask is not None:
        return mask
    shape = (1, 1, query.shape[2], key.shape[2])
    if module.config._attn_implementation == "eager":
        return query.new_zeros(shape)  # added to the products: all see all
    causal, every = kwargs.get("is_causal"), torch.ones(shape, dtype=torch.bool, device=key.device)
    causal = getattr(module, "is_causal", True) if causal is None else causal
    return every.tril() if causal else every


def windowed(mask: Tensor, visual: Tensor, close: Tensor) -> Tensor:
    """Returns ``mask`` in which visual tokens see those that are ``close``, and no other of them.

    Args:
        mask: ``[., ., L, keys]`` bool or additive; keys beyond L stay as they are.
        visual: ``[B, L]`` bool; ``close`` ``[B, L, L]`` bool.
    """
    both = visual[:, None, :, None] & visual[:, None, None, :]
    ours = close if mask.dtype == torch.bool else additive(close, mask.dtype)
    mask = mask.expand(len(both), -1, -1, -1).clone()
    prompt = mask[..., : both.shape[3]]
    prompt.copy_(torch.where(both, ours[:, None], prompt))
    return mask
