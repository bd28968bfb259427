"""The blocks of a ViT while tokens leave or merge in them: one batch, every row of equal length.

What has happened so far is a ``State`` per block, never changed in place: so a block that runs once
more (gradient checkpointing) finds what it found before. Where every image is left the same count
there is no list of rows, no number read from the device and no boolean index, so that torch.compile
makes one graph of it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import dropout, scaled_dot_product_attention

from vtprune.attending import Attended, Attending
from vtprune.engine.reduction import maps, reduced, reduced_map
from vtprune.engine.vit_choice import choose
from vtprune.engine.vit_plan import Plan
from vtprune.engine.vit_state import State, added, left_of
from vtprune.errors import UnsupportedError
from vtprune.kernels.gather_tokens import gather_tokens
from vtprune.types import (
    ClsRow,
    Keys,
    Left,
    Maps,
    Mix,
    Patches,
    Received,
    Selection,
    Signals,
    Stage,
    TowerNeed,
    WideKeys,
)
from vtprune.vit_adapters._base import ViTAdapter
from vtprune.vlm_adapters._base import square


class Passage:
    """The way of one batch after another through the blocks.

    Attributes:
        entering: the state that enters each block, and after those the one that leaves the last.
        tokens: of the last batch images and patches.
        counted: per block the tokens, prefix included, that entered attention and MLP; shares:
            what part of the attention among them counts, by its rule.
        whole: whether blocks give each patch what the token that it is in has become.
    """

    def __init__(self, adapter: ViTAdapter, plan: Plan) -> None:
        self.adapter, self.plan = adapter, plan
        depth = len(adapter.blocks)
        self.entering = [State()] * (depth + 1)
        self.counted, self.shares = [(0, 0)] * depth, [1.0] * depth
        self.batch = self.patches = 0
        self.whole = self._was_whole = False
        self._guests = plan.strategy.guests(adapter.facts)
        self._prefix = adapter.n_prefix + (self._guests is not None)

    @property
    def left(self) -> list[int]:
        """Tokens that are left of the patches of each image."""
        state = self.entering[-1]
        n = self.patches if state.index is None else state.index.shape[1]
        return state.lengths() or [n] * self.batch

    def run(self, layer: int, block: Any, original: Any, x: Tensor, *args: Any, **kw: Any) -> Any:
        """Stands for the forward of a block."""
        given = {**dict(zip(self.adapter.takes, args, strict=False)), **kw}
        p = self.adapter.n_prefix
        state = self.entering[layer] if layer else State()
        if not layer:
            self.batch, self.patches = x.shape[0], x.shape[1] - p
            self._was_whole = self.whole
        if self.whole and state.index is not None:
            x = torch.cat([x[:, :p], gather_tokens(state.index, x[:, p:])[0]], dim=1)
        if self._guests is not None:
            x = self._let_in(self._guests[layer].to(x), x, state)
        entered = x.shape[1]
        if self._untouched(layer, x, state):
            passed, out = entered, original(x, *args, **kw)
        else:
            _refuse_masks(block, given)
            x, state = self._attend(layer, block, x, state, given.get("rope"))
            passed = x.shape[1]
            out = x + self.adapter.passed(block, x)
            out, state = self._after(layer, out, state)
        if self._guests is not None:
            state = replace(state, guests=out[:, p : self._prefix])
            out = torch.cat([out[:, :p], out[:, self._prefix :]], dim=1)
        self.entering[layer + 1], self.counted[layer] = state, (entered, passed)
        return self._spread(out, state) if self.whole else out

    def _let_in(self, learned: Tensor, x: Tensor, state: State) -> Tensor:
        """Puts the strategy's token behind the prefix: at first a copy of [CLS]."""
        p, guest = self.adapter.n_prefix, x[:, :1] if state.guests is None else state.guests
        return torch.cat([x[:, :p], guest.detach() + learned, x[:, p:]], dim=1)

    def _untouched(self, layer: int, x: Tensor, state: State) -> bool:
        """Whether a block may run as it is: nothing has left, nothing leaves, nothing is read."""
        if state.index is not None or self._guests is not None or self._reads(layer):
            return False
        if self.plan.rule(layer) is not None:
            return False
        return not self._acts(layer, x)

    def _reads(self, layer: int) -> list[TowerNeed]:
        return self.plan.reads(layer, self.patches)

    def _acts(self, layer: int, x: Tensor) -> bool:
        """Whether tokens leave in a block; a count that depends on the image may be any."""
        stage = self.plan.stage(layer)
        if stage is None:
            return False
        n = x.shape[1] - self._prefix
        count = self.plan.known(layer, n, self.patches)
        return count is None or count < n

    def _attend(
        self, layer: int, block: Any, x: Tensor, state: State, rope: Tensor | None
    ) -> tuple[Tensor, State]:
        """Runs the first half, and what happens before the second."""
        adapter, attention = self.adapter, self.adapter.attention(block)
        stage = self.plan.stage(layer)
        normed = adapter.norm(block, x)
        q, content, v = adapter.project(attention, normed)
        k = content
        if rope is not None:
            rope = left_of(rope, state.index)
            q, k = (self._turn(attention, part, rope) for part in (q, k))
        bias = added(state, q)
        ruled, state = self._by_rule(layer, normed, q, k, v, bias, state)
        state = self._read(layer, state, q, content, k, v, bias, ruled and ruled.map)
        dropped = adapter.dropout(attention) if block.training else 0.0
        if ruled is not None:
            out = dropout(ruled.out, dropped)
        elif stage and stage.ahead:
            weights = maps(q, k, None, bias)
            x, state, chosen = self._cut(layer, stage, x, state)
            weights = merged(weights, chosen, self._prefix)
            normed = adapter.norm(block, x)
            v = adapter.project(attention, normed)[2]
            out = dropout(weights, dropped).to(v.dtype) @ v
        else:
            out = scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropped)
        x = x + adapter.attended(block, out.transpose(1, 2).flatten(2), normed)
        return self._cut(layer, stage, x, state)[:2] if stage and stage.before_mlp else (x, state)

    def _by_rule(
        self,
        layer: int,
        x: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        state: State,
    ) -> tuple[Attended | None, State]:
        """Returns what a rule makes of a block's attention, None where there is none."""
        rule = self.plan.rule(layer)
        if rule is None:
            return None, state
        left = (state.tokens, state.rows)
        made = rule.attend(Attending(layer, self._prefix, q, k, v, x, bias, *left))
        self.shares[layer] = made.share
        tokens, rows = {**state.tokens, **made.tokens}, {**state.rows, **made.rows}
        return made, replace(state, tokens=tokens, rows=rows)

    def _turn(self, attention: Any, x: Tensor, rope: Tensor) -> Tensor:
        """Applies a rotary embedding, of which a strategy's token has none."""
        if self._guests is None:
            return self.adapter.turn(attention, x, rope)
        p, more = self.adapter.n_prefix, self._prefix
        turned = self.adapter.turn(attention, torch.cat([x[:, :, :p], x[:, :, more:]], dim=2), rope)
        return torch.cat([turned[:, :, :p], x[:, :, p:more], turned[:, :, p:]], dim=2)

    @torch.no_grad()
    def _read(
        self,
        layer: int,
        state: State,
        q: Tensor,
        content: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        map: Tensor | None,
    ) -> State:
        """Reads what is wanted of this block; keys without a rotary embedding."""
        read = []
        for need in self._reads(layer):
            if isinstance(need, Left):
                read.append((need, state.tokens[need.name][:, self._prefix :]))
            elif map is not None and isinstance(need, (ClsRow, Maps, Received)):
                read.append((need, reduced_map(need, map, self._prefix)))
            elif not isinstance(need, Patches):
                keys = content if isinstance(need, (Keys, WideKeys)) else k
                read.append((need, reduced(need, q, keys, v, self._prefix, None, bias)))
        return replace(state, values=(*state.values, *read))

    def _after(self, layer: int, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Does what happens after a block."""
        stage, p = self.plan.stage(layer), self._prefix
        seen = [need for need in self._reads(layer) if isinstance(need, Patches)]
        if seen:
            values = tuple((need, x[:, p:].detach().float()) for need in seen)
            state = replace(state, values=(*state.values, *values))
        if stage and not stage.inside_block:
            x, state, _ = self._cut(layer, stage, x, state)
        return x, replace(state, values=state.lasting)

    def _cut(
        self, layer: int, stage: Stage, x: Tensor, state: State
    ) -> tuple[Tensor, State, Selection]:
        """Leaves what the strategy chooses, and makes of it."""
        p = self._prefix
        signals = Signals(
            x[:, p:],
            square(self.patches) if state.index is None else None,
            None,
            {need: value for need, value in state.values if need in stage.needs},
            inside=self.plan.inside(layer, self.patches, len(x)),
            n_prefix=p,
            size=state.sizes,
        )
        with torch.no_grad():
            chosen, padded = choose(self.plan, layer, signals, state.lengths())
        if chosen.is_identity:
            return x, state, chosen
        _refuse_prefix(self.plan.strategy.name, chosen)
        x = torch.cat([x[:, :p], chosen.apply(x[:, p:])], dim=1)
        return x, state.after(chosen, stage.proportional, padded), chosen

    def _spread(self, x: Tensor, state: State) -> Tensor:
        """Returns the states of all patches, from those of the tokens that they are in."""
        if state.owner is None:
            return x
        if not torch.compiler.is_compiling() and bool((state.owner < 0).any()):
            raise UnsupportedError(
                f"{self.plan.strategy.name} lets patches leave, so the outputs of blocks have no "
                "place for each patch. Use a strategy that merges, such as 'tome', or remove() the "
                "handle for this call."
            )
        p = self.adapter.n_prefix
        return torch.cat([x[:, :p], gather_tokens(state.owner, x[:, p:])[0]], dim=1)

    # -- what comes after the blocks -----------------------------------------------------------

    def weigh(self, x: Tensor) -> Tensor:
        """Returns the states, scaled so that their mean counts every patch as it is to."""
        x = self._of_rules(x)
        factors = self._factors(x.shape[1])
        if factors is None:
            return x
        first = 0 if self.adapter.mean_has_prefix else self.adapter.n_prefix
        part = factors[:, first:]
        share = part * (part.shape[1] / part.sum(1, keepdim=True))
        factors = torch.cat([factors[:, :first], share], dim=1)
        return x * factors[..., None].to(x.dtype)

    def _of_rules(self, x: Tensor) -> Tensor:
        """Returns the states times what the last rule leaves for that."""
        rule, state = self.plan.rule(len(self.counted) - 1), self.entering[-1]
        if rule is None or rule.pooled is None:
            return x
        p = self.adapter.n_prefix
        left = state.tokens[rule.pooled]
        weight = torch.cat([left[:, :p], left[:, self._prefix :]], dim=1)
        if self._was_whole and state.owner is not None:
            spread = gather_tokens(state.owner, weight[:, p:])[0]
            weight = torch.cat([weight[:, :p], spread], dim=1)
        return x * weight[..., None].to(x.dtype)

    def bias(self, length: int) -> Tensor | None:
        """Returns what keys of ``length`` tokens get added, ``[B, length]`` float32, or None."""
        factors = self._factors(length)
        return None if factors is None else factors.log()

    def _factors(self, length: int) -> Tensor | None:
        return None if self._was_whole else self.entering[-1].factors(length)


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


def _refuse_masks(block: Any, given: dict[str, Any]) -> None:
    masks = {k: v for k, v in given.items() if isinstance(v, Tensor) and k != "rope"}
    odd = [*masks, *(["is_causal"] if given.get("is_causal") else [])]
    if odd:
        raise UnsupportedError(
            f"{type(block).__name__} was given {', '.join(odd)}, which cannot follow the tokens "
            "that leave. Leave it out, or remove() the handle for this call."
        )


def _refuse_prefix(name: str, chosen: Selection) -> None:
    """Raises UnsupportedError where an output is made of prefix tokens."""
    if torch.compiler.is_compiling() or not chosen.n_prefix:
        return
    raise UnsupportedError(
        f"{name} makes tokens of [CLS]; in a ViT, which keeps it, tokens are made of patches "
        "alone. Use another strategy, such as 'tome'."
    )
