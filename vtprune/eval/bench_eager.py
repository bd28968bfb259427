"""What one would write by hand in place of the operations, which kernels are measured against."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad


def attention(q: Tensor, k: Tensor) -> Tensor:
    """Returns the mean attention of each key, from the whole matrix of probabilities."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    logits = q @ k.mT * q.shape[-1] ** -0.5
    return logits.softmax(-1, dtype=torch.float32).mean((1, 2))


def pyramid(q: Tensor, k: Tensor, v: Tensor, levels: Tensor, block: int) -> Tensor:
    """Returns attention to means of keys, from the whole matrix of all levels' logits."""
    length, more = q.shape[2], -q.shape[2] % block
    k, v = (
        pad(x.repeat_interleave(q.shape[1] // x.shape[1], dim=1), (0, 0, 0, more)) for x in (k, v)
    )
    place, logits, values = torch.arange(length, device=q.device), [], []
    for level in (1, 2, 4, 8):
        keys, means = (x.unflatten(2, (-1, level)).mean(3) for x in (k, v))
        last = (torch.arange(keys.shape[2], device=q.device) + 1) * level - 1
        seen = levels[..., place[:, None] // block, last // block] == level
        found = q @ keys.mT * q.shape[-1] ** -0.5 + math.log(level)
        logits.append(found.masked_fill(~(seen & (last <= place[:, None])), -torch.inf))
        values.append(means)
    weights = torch.cat(logits, dim=-1).softmax(-1, dtype=torch.float32)
    return weights.to(v.dtype) @ torch.cat(values, dim=2)


def greedy(features: Tensor, k: int, mode: str, given: Any) -> Tensor:
    """Returns the picks ``[B, k]`` of a loop that keeps a table of all pairs."""
    units = normalize(features.float(), dim=-1)
    cosine = units @ units.mT
    if mode == "max_min":
        apart = 1 - cosine
        nearest = apart.topk(2, dim=-1, largest=False).values[..., 1]
        return _picks(apart, nearest.argmax(1), k, torch.minimum)
    if mode == "max_sum":
        return _picks(1 - cosine, given, k, torch.add)
    if mode == "mmr":
        low, high = given.aminmax(dim=1, keepdim=True)
        scores = (given - low) / (high - low)
        return _picks(scores[:, None] - 0.3 * cosine, scores.argmax(1), k, torch.minimum)
    return _dpp(given[:, :, None] * cosine * given[:, None], k)


def _picks(table: Tensor, pick: Tensor, k: int, join: Callable[..., Tensor]) -> Tensor:
    """Returns picks, each where the joined rows of ``table`` ``[B, N, N]`` before are highest."""
    rows = torch.arange(len(table), device=table.device)
    picks, value = [pick], table[rows, pick]
    for _ in range(k - 1):
        value[rows, pick] = -torch.inf
        pick = value.argmax(1)
        picks.append(pick)
        value = join(value, table[rows, pick])
    return torch.stack(picks, dim=1)


def _dpp(kernel: Tensor, k: int) -> Tensor:
    """Returns the picks that raise the determinant of ``kernel`` ``[B, N, N]`` most."""
    rows = torch.arange(len(kernel), device=kernel.device)
    gain = kernel.diagonal(dim1=1, dim2=2).clone()
    factor = kernel.new_zeros(len(kernel), k, kernel.shape[1])
    picks = []
    for step in range(k):
        pick = gain.argmax(1)
        picks.append(pick)
        before = factor[:, :step]
        row = kernel[rows, pick] - (before[rows, :, pick][:, None] @ before)[:, 0]
        factor[:, step] = row / gain[rows, pick, None].sqrt()
        gain = gain - factor[:, step].square()
        gain[rows, pick] = -torch.inf
    return torch.stack(picks, dim=1)


def merge(x: Tensor, source: Tensor, target: Tensor, weight: Tensor, n_out: int) -> Tensor:
    """Returns the weighted sums ``[B, n_out, D]``, added up in the dtype of ``x``."""
    width = x.shape[-1]
    parts = x.gather(1, source[..., None].expand(-1, -1, width)) * weight[..., None].to(x.dtype)
    out = x.new_zeros(len(x), n_out, width)
    return out.scatter_add(1, target[..., None].expand(-1, -1, width), parts)


def topk(scores: Tensor, k: int) -> Tensor:
    """Returns the places of the ``k`` highest scores in ascending order, ``[B, k]``."""
    return scores.topk(k, dim=1).indices.sort(dim=1).values


def pairs(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """Returns norms and dot products of paired rows, ``[...]`` each."""
    x, y = x.float(), y.float()
    return x.norm(dim=-1), y.norm(dim=-1), (x * y).sum(-1)


def gather(index: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Returns the rows ``index`` ``[B, K]`` of each tensor."""
    rows = torch.arange(len(index), device=index.device)[:, None]
    return tuple(x[rows, index] for x in tensors)


def scatter(index: Tensor, rows: Tensor, into: Tensor) -> tuple[Tensor, ...]:
    """Returns a copy of ``into`` ``[B, N, D]`` with ``rows`` ``[B, K, D]`` at ``index``."""
    out = into.clone()
    out[torch.arange(len(index), device=index.device)[:, None], index] = rows
    return (out,)
