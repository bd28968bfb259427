"""Attention rows of some queries made anew, edited on the way; the others stay as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vtprune.interventions import Intervention, Keys
from vtprune.kernels._common import full_precision, widened

AT_ONCE = 256  # rows, so that there is never an N x N matrix


@dataclass(frozen=True)
class Edit:
    """An intervention with what it knows of the keys, and its ``rows`` ``[B, Q]`` bool."""

    rule: Intervention
    keys: Keys
    rows: Tensor


def edited(
    edits: Sequence[Edit],
    made: tuple[Tensor, Tensor | None],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Seen,
    scale: float | None,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor | None, int]:
    """Returns what attention gives once its rows were edited, one edit after the other.

    Where an edit changes nothing of a row in a head, that stays bit by bit what it was.

    Args:
        made: what the model's own attention gave, ``[B, Q, H, d]``, and its rows
            ``[B, H, Q, K]`` if it says them.
        query: ``[B, H, Q, d]``; key, value: ``[B, Hkv, K, d]``.

    Returns:
        Both again, and how many multiply-accumulates it took.
    """
    out, weights = made
    asked = torch.stack([edit.rows for edit in edits]).any(0)
    n = int(asked.sum(1).max()) if asked.shape[1] > 1 else 1
    if not n:
        return out, weights, 0
    every = set(range(query.shape[1]))
    some = sorted(set[int]().union(*(edit.rule.heads or every for edit in edits)))
    heads = torch.tensor(some, device=query.device)
    groups = query.shape[1] // key.shape[1]
    if len(some) < query.shape[1]:
        query, (key, value) = query[:, some], (x[:, heads // groups] for x in (key, value))
    out, weights = out.clone(), None if weights is None else weights.clone()
    index = asked.long().argsort(dim=1, descending=True, stable=True)[:, :n]
    real = asked.gather(1, index)
    for rows, there in zip(index.split(AT_ONCE, 1), real.split(AT_ONCE, 1), strict=True):
        queries = query.gather(2, rows[:, None, :, None].expand(-1, len(some), -1, query.shape[3]))
        sees = seen.of(rows) | ~there[:, None, :, None]  # of rows that are none: no NaN
        new, drawn, changed = _anew(edits, rows, heads, queries, key, value, sees, scale, dropout)
        b = torch.arange(len(rows), device=rows.device)[:, None, None]
        own, takes = rows[:, :, None], (changed & there[:, None]).mT[..., None]  # [B, M, h, 1]
        out[b, own, heads] = torch.where(takes, new.transpose(1, 2).to(out), out[b, own, heads])
        if weights is not None:
            drawn = drawn.transpose(1, 2).to(weights)
            weights[b, heads, own] = torch.where(takes, drawn, weights[b, heads, own])
    macs = 2 * index.numel() * len(some) * key.shape[2] * key.shape[3]
    return out, weights, macs


def _anew(
    edits: Sequence[Edit],
    rows: Tensor,
    heads: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Tensor,
    scale: float | None,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns outputs ``[B, h, M, d]``, rows ``[B, h, M, K]``, and where those changed."""
    factor = query.shape[3] ** -0.5 if scale is None else scale
    with full_precision(query):
        plain = _shared(widened(query) * factor, widened(key).mT).masked_fill(~seen, -torch.inf)
        logits = plain
        for edit in edits:
            if edit.rule.before_softmax:
                logits = _by(edit, logits, rows, heads).masked_fill(~seen, -torch.inf)
        changed, weights = (logits != plain).any(-1), logits.softmax(-1)
        for edit in edits:
            if not edit.rule.before_softmax:
                new = _by(edit, weights, rows, heads)
                changed, weights = changed | (new != weights).any(-1), new
        drawn = F.dropout(weights, dropout) if dropout else weights
        return _shared(drawn, widened(value)), drawn, changed


def _by(edit: Edit, x: Tensor, rows: Tensor, heads: Tensor) -> Tensor:
    """Returns ``x`` ``[B, h, M, K]`` with the rows and heads that an edit is for as it has them."""
    own = edit.rows.gather(1, rows)[:, None, :, None]
    if edit.rule.heads is None:
        return torch.where(own, edit.rule.editor.edit(x, edit.keys), x)
    places = torch.searchsorted(heads, torch.tensor(edit.rule.heads, device=heads.device))
    some, x = x[:, places], x.clone()
    x[:, places] = torch.where(own, edit.rule.editor.edit(some, edit.keys), some)
    return x


def _shared(x: Tensor, y: Tensor) -> Tensor:
    """Returns ``x`` ``[B, H, M, a]`` by ``y`` ``[B, Hkv, a, b]``, whose heads are shared."""
    each = x.unflatten(1, (y.shape[1], -1))
    return (each.flatten(2, 3) @ y).unflatten(2, each.shape[2:4]).flatten(1, 2)


@dataclass(frozen=True)
class Seen:
    """Which keys a query sees: by the mask, or where there is none by the order.

    Attributes:
        mask: ``[., ., Q, K]`` bool or additive; or ``[B, K]``, padding is 0; or None.
        causal: whether a query without a mask of its own sees no later key.
        queries, keys: Q and K; the last query is the last key.
    """

    mask: Tensor | None
    causal: bool
    queries: int
    keys: int

    @classmethod
    def by(cls, mask: Any, module: Any, query: Tensor, key: Tensor, is_causal: bool | None) -> Seen:
        """Returns what a module lets queries see; ``is_causal`` as it says it."""
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if mask is None and module.config._attn_implementation == "eager":
            causal = False  # there a mask is added, and nothing else hides
        return cls(mask, bool(causal), query.shape[2], key.shape[2])

    def of(self, rows: Tensor) -> Tensor:
        """Returns what queries ``rows`` ``[B, M]`` see, ``[B, 1, M, K]`` bool."""
        if self.mask is not None and self.mask.ndim == 4:
            mask = self.mask[:, 0].expand(len(rows), -1, -1)
            found = mask.gather(1, rows[..., None].expand(-1, -1, mask.shape[2]))
            return (found if found.dtype == torch.bool else found >= 0)[:, None]
        place = torch.arange(self.keys, device=rows.device)
        last = rows + self.keys - self.queries if self.causal else rows * 0 + self.keys
        found = place <= last[..., None]
        if self.mask is not None:
            found = found & self.mask.bool()[:, None]
        return found[:, None]

    def row(self, b: int, spots: Tensor) -> Tensor:
        """Returns which of columns ``spots`` ``[n]`` of a row of the batch see each other."""
        if self.mask is not None and self.mask.ndim == 4:
            mask = self.mask[b if len(self.mask) > 1 else 0, 0][spots][:, spots]
            return mask if mask.dtype == torch.bool else mask >= 0
        order = spots[:, None] >= spots
        return order if self.causal else torch.ones_like(order)
