"""From queries, keys and values of an attention call to the quantities that strategies ask for."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from vtprune.errors import HookError
from vtprune.kernels._common import full_precision
from vtprune.kernels.attn_received import attn_received
from vtprune.kernels.attn_rows import attn_rows
from vtprune.types import (
    ClsRow,
    Flow,
    Guidance,
    Keys,
    Maps,
    Received,
    TotalReceived,
    TowerNeed,
    ValueNorm,
    WideClsRow,
    WideKeys,
)


def reduced(
    need: TowerNeed,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    n_prefix: int,
    scale: float | None,
    added: Tensor | None,
    lse: Tensor | None = None,
) -> Tensor:
    """Returns a quantity of each patch, ``[B, N, ...]`` float32.

    Args:
        q, k, v: ``[B, H, S, d]``, the first ``n_prefix`` of S no patches.
        scale: of the products of queries and keys; None = ``d ** -0.5``.
        added: to them, ``[B, 1, 1, S]``.
        lse: ``[B, H, S]`` log-sum-exp of what the softmax gets, where that is known.
    """
    if isinstance(need, Keys):
        return k.float().mean(1)[:, n_prefix:]
    if isinstance(need, WideKeys):
        return _wide(k)[:, 0, n_prefix:].float()
    if isinstance(need, ValueNorm):
        return _wide(v)[:, 0, n_prefix:].float().norm(dim=-1)
    if isinstance(need, Guidance):
        return _guidance(q, k, n_prefix)
    if isinstance(need, WideClsRow):
        q, k, scale = _wide(q), _wide(k), None
    if added is not None:
        q, k, scale = _joined(q, k, added, scale)
    if isinstance(need, Maps):
        return maps(q, k, scale, None)
    if isinstance(need, Flow):
        return _flow(q, k, v, scale, n_prefix)
    if isinstance(need, (ClsRow, WideClsRow)):
        return attn_rows(q[:, :, :1], k, scale=scale)[:, n_prefix:]
    if isinstance(need, Received):
        times = q.shape[2] if isinstance(need, TotalReceived) else 1
        return times * attn_received(q, k, scale=scale, lse=lse)[:, n_prefix:]
    raise HookError(f"The tap cannot read {need}.")


def reduced_map(need: TowerNeed, map: Tensor, n_prefix: int, real: Tensor | None) -> Tensor:
    """Returns a quantity of attention as its map says, where that is at hand.

    Args:
        map: ``[B, H, S, S]`` float32, from query to key.
        real: which queries do not only fill their row up, ``[B, S]`` bool; None = all.
    """
    if isinstance(need, Maps):
        return map
    if isinstance(need, ClsRow):
        return map[:, :, 0].mean(1)[:, n_prefix:]
    queries = map.new_ones(map.shape[0], map.shape[2]) if real is None else real.to(map.dtype)
    total = (map * queries[:, None, :, None]).sum(2).mean(1)[:, n_prefix:]
    return total if isinstance(need, TotalReceived) else total / queries.sum(1, keepdim=True)


def maps(q: Tensor, k: Tensor, scale: float | None, added: Tensor | None) -> Tensor:
    """Returns attention from query to key, ``[B, H, S, S]`` float32."""
    with full_precision(q):
        products = q.float() @ k.float().mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    return (products if added is None else products + added.float()).softmax(-1)


def _guidance(q: Tensor, k: Tensor, n_prefix: int) -> Tensor:
    """Returns ``Guidance`` of each patch: ``[B, N]`` float32."""
    query, keys = _wide(q)[:, 0].float(), _wide(k)[:, 0, n_prefix:].float()
    query = query[:, n_prefix - 1, None] if n_prefix else query.mean(1, keepdim=True)
    return cosine_similarity(keys, query, dim=-1)  # tokens of CrossGET learn through it


def _flow(q: Tensor, k: Tensor, v: Tensor, scale: float | None, n_prefix: int) -> Tensor:
    """Returns ``Flow`` of each patch: ``[B, N, 2]`` float32."""
    query, anchor = (x[:, :, :1] if n_prefix else x.float().mean(2, keepdim=True) for x in (q, v))
    relation = attn_rows(query, k, scale=scale)[:, n_prefix:]
    semantic = attn_rows(anchor, v, scale=1.0)[:, n_prefix:]
    relation, score = passing(relation, semantic, v[:, :, n_prefix:])
    return torch.stack([relation, score], dim=-1)


def passing(relation: Tensor, semantic: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Returns how much flows through each token: its share of ``relation``, and its score.

    Args:
        relation: ``[B, N]`` attention of one query; ``semantic``: ``[B, N]`` likeness of values.
        v: ``[B, Hkv, N, d]`` the values themselves.

    Returns:
        ``[B, N]`` each, float32.
    """
    tiny = torch.finfo(torch.float32).tiny
    relation, semantic = (x / x.sum(1, keepdim=True).clamp(min=tiny) for x in (relation, semantic))
    return relation, (relation + semantic) * v.float().mean(1).norm(1, dim=-1)


def _wide(x: Tensor) -> Tensor:
    """Puts the heads of ``[B, H, S, d]`` side by side: ``[B, 1, S, H * d]``."""
    return x.transpose(1, 2).flatten(2)[:, None]


def _joined(
    q: Tensor, k: Tensor, added: Tensor, scale: float | None
) -> tuple[Tensor, Tensor, float]:
    """Lets products of queries and keys say by one more dimension what is added to them."""
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    q, k = q.float(), k.float()
    more = added.mT.float().expand(len(k), k.shape[1], -1, -1)
    ones = torch.full_like(q[..., :1], 1 / factor)
    return torch.cat([q, ones], dim=-1), torch.cat([k, more], dim=-1), factor
