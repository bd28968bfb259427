"""The attention of a ViT's block: what it is made of, what is read of it, what it makes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import dropout, scaled_dot_product_attention

from vtprune.attending import Attended, Attending, AttentionRule
from vtprune.engine.reduction import maps, reduced, reduced_map
from vtprune.engine.vit_state import State, added, left_of
from vtprune.types import (
    ClsRow,
    Guidance,
    Keys,
    Left,
    Maps,
    Mix,
    Received,
    Selection,
    TowerNeed,
    WideKeys,
)
from vtprune.vit_adapters._base import ViTAdapter


@dataclass(frozen=True)
class Parts:
    """What the attention of a block is made of.

    Attributes:
        layer: 0-based block; n_prefix: tokens before the first patch.
        x: ``[B, S, C]``, the normed states that enter.
        q, k, v: ``[B, H, S, d]``; content: ``k`` before a rotary embedding.
        bias: what keys get added, ``[B, 1, 1, S]``, or None.
        state: what enters the block, and what its rule leaves.
        ruled: what a rule makes of it, in place of attention.
    """

    layer: int
    n_prefix: int
    x: Tensor
    q: Tensor
    content: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    state: State
    ruled: Attended | None = None

    @classmethod
    def of(
        cls,
        adapter: ViTAdapter,
        layer: int,
        x: Tensor,
        state: State,
        rope: Tensor | None,
        n_prefix: int,
    ) -> Parts:
        """Returns those of block ``layer``; its tokens of no image have no rotary embedding."""
        block = adapter.blocks[layer]
        attention, normed = adapter.attention(block), adapter.norm(block, x)
        q, content, v = adapter.project(attention, normed)
        k = content
        if rope is not None:
            rope = left_of(rope, state.index)
            q, k = (_turned(adapter, attention, part, rope, n_prefix) for part in (q, k))
        return cls(layer, n_prefix, normed, q, content, k, v, added(state, q), state)

    def by(self, rule: AttentionRule) -> Parts:
        """Returns the same with what ``rule`` makes of them."""
        left = self.state.tokens, self.state.rows
        given = (self.layer, self.n_prefix, self.q, self.k, self.v, self.x, self.bias)
        made = rule.attend(Attending(*given, *left))
        tokens, rows = ({**a, **b} for a, b in zip(left, (made.tokens, made.rows), strict=True))
        return replace(self, ruled=made, state=replace(self.state, tokens=tokens, rows=rows))

    @torch.no_grad()
    def read(self, need: TowerNeed) -> Tensor:
        """Returns a quantity of each patch; keys without a rotary embedding."""
        if isinstance(need, Left):
            return self.state.tokens[need.name][:, self.n_prefix :]
        if isinstance(need, (ClsRow, Maps, Received)):
            map = None if self.ruled is None else self.ruled.map
            if map is None and self.state.padded and isinstance(need, Received):
                map = self.map()
            if map is not None:
                return reduced_map(need, map, self.n_prefix, self._real)
        k = self.content if isinstance(need, (Guidance, Keys, WideKeys)) else self.k
        q = self.q
        return reduced(need, q, k, self.v, self.n_prefix, None, self.bias)

    @property
    def _real(self) -> Tensor | None:
        """Which queries do not only fill their row up, ``[B, S]`` bool; None = all."""
        if not self.state.padded or self.bias is None:
            return None
        return self.bias[:, 0, 0] > -torch.inf

    def map(self) -> Tensor:
        """Returns attention from query to key, ``[B, H, S, S]`` float32."""
        return maps(self.q, self.k, None, self.bias)

    def attend(self, dropped: float) -> Tensor:
        """Returns what tokens attend to, ``[B, H, S, d]``; ``dropped`` is the share left out."""
        if self.ruled is not None:
            return dropout(self.ruled.out, dropped)
        q, k, v = self.q, self.k, self.v
        return scaled_dot_product_attention(q, k, v, attn_mask=self.bias, dropout_p=dropped)


def _turned(adapter: ViTAdapter, attention: Any, x: Tensor, rope: Tensor, n_prefix: int) -> Tensor:
    """Applies a rotary embedding, of which a strategy's token, last in the prefix, has none."""
    p = adapter.n_prefix
    if p == n_prefix:
        return adapter.turn(attention, x, rope)
    own = torch.cat([x[:, :, :p], x[:, :, n_prefix:]], dim=2)
    turned = adapter.turn(attention, own, rope)
    return torch.cat([turned[:, :, :p], x[:, :, p:n_prefix], turned[:, :, p:]], dim=2)


def merged(weights: Tensor, chosen: Selection, n_prefix: int) -> Tensor:
    """Returns an attention map among the tokens that are left.

    Attention to tokens that merge is added up; that of tokens that merge is mixed as they are. What
    went to tokens that leave goes to the others.

    Args:
        weights: ``[B, H, S, S]`` float32, from query to key, the prefix first.

    Returns:
        ``[B, H, K, K]``, the prefix included.
    """
    if chosen.is_identity:
        return weights
    mix = chosen.mix
    whole = replace(chosen, mix=mix and Mix(mix.source, mix.target, torch.ones_like(mix.weight)))
    for dim, part in ((3, whole), (2, chosen)):
        moved = weights.movedim(dim, 1)  # [B, S, H, S]
        left = part.apply(moved[:, n_prefix:].flatten(2)).unflatten(2, moved.shape[2:])
        weights = torch.cat([moved[:, :n_prefix], left], dim=1).movedim(1, dim)
    return weights / weights.sum(-1, keepdim=True)
