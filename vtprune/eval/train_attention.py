"""Attention for training on a CPU: torch's own forward, a backward of plain matrix products.

Torch's backward of fused attention on a CPU takes eight times its forward in bfloat16, and more
than half of a training step of a small model. Two to three times faster here, same gradients.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

NAME = "vtprune_training"
# With "flash" in the name transformers hands over all windows of a tower at once.
WINDOWED = "vtprune_flash_training"
CHUNK = 2**19  # scores at a time, so that they stay in the cache


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        ctx.save_for_backward(q, k, v, out, mask)
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, mask = ctx.saved_tensors
        shape, scale = q.shape, q.shape[-1] ** -0.5
        q, k, v, out, grad = (
            t.reshape(-1, *t.shape[2:]).contiguous()
            for t in (q * scale, k, v, out, grad_outputs[0])
        )
        wide = torch.promote_types(q.dtype, torch.float32)
        delta = (out.to(wide) * grad.to(wide)).sum(-1, keepdim=True).to(q.dtype)
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        hidden = None if mask is None else ~mask[0, 0]
        step = max(1, CHUNK // q.shape[1] ** 2)
        for start in range(0, len(q), step):
            i = slice(start, start + step)
            scores = torch.bmm(q[i], k[i].mT)
            if hidden is not None:
                scores.masked_fill_(hidden, float("-inf"))
            p = scores.softmax(-1)
            torch.bmm(p.mT, grad[i], out=dv[i])
            slope = torch.bmm(grad[i], v[i].mT).sub_(delta[i]).mul_(p)
            torch.bmm(slope, k[i], out=dq[i])
            torch.bmm(slope.mT, q[i], out=dk[i])
        return dq.mul_(scale).view(shape), dk.view(shape), dv.view(shape), None


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attends ``[B, H, S, D]`` by ``[B, H_kv, S, D]``; a mask is ``[1, 1, S, S]``, True = visible.

    Without a mask every row sees all. A module that is ``watch``ed keeps its queries and keys.
    """
    groups = getattr(module, "num_key_value_groups", 1)
    if groups > 1:
        key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    if getattr(module, "watched", False):
        module.seen = query, key
    out = _Attention.apply(query, key, value, attention_mask)
    return out.transpose(1, 2).contiguous(), None


def windowed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    cu_seq_lens_q: Tensor,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attends ``[1, H, S, D]`` within windows, all of which must be equally long."""
    n = len(cu_seq_lens_q) - 1
    parts = (t[0].unflatten(1, (n, -1)) for t in (query, key, value))  # [H, n, L, D]
    out = _Attention.apply(*parts, attention_mask)
    return out.flatten(1, 2).transpose(0, 1)[None].contiguous(), None


def watch(module: Any) -> None:
    """Makes an attention module keep the queries and keys of its last call as ``seen``."""
    module.watched = True


def use(model: Any, windowed: Any = None) -> None:
    """Makes ``model`` attend with this, its part ``windowed`` within windows; for training only."""
    AttentionInterface.register(NAME, attention)
    AttentionInterface.register(WINDOWED, windowed_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
    if windowed is not None:
        windowed.config._attn_implementation = WINDOWED  # asked by name, transformers wants flash
