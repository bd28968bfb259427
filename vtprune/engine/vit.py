"""The blocks of a ViT while tokens leave or merge in them: one batch, every row of equal length.

What has happened so far is a ``State`` per block, never changed in place: so a block that runs once
more (gradient checkpointing) finds what it found before. There is no list of rows, no number read
from the device and no boolean index, so that torch.compile makes one graph of it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from vtprune.engine.reduction import reduced
from vtprune.engine.signals import select_group
from vtprune.engine.vit_plan import Plan
from vtprune.errors import UnsupportedError
from vtprune.kernels.gather_tokens import gather_tokens
from vtprune.types import Inside, Keys, Mix, Patches, Selection, Signals, TowerNeed, WideKeys
from vtprune.vit_adapters._base import ViTAdapter
from vtprune.vlm_adapters._base import square


@dataclass(frozen=True)
class State:
    """What has become of the patches.

    Attributes:
        index: ``[B, n]`` int64, the patch whose place each token has; None = nothing happened.
        owner: ``[B, N]`` int64, the token that each patch is in, -1 = it has left.
        sizes: ``[B, n]`` float32, how many patches each token stands for; None = one each.
        proportional: whether tokens get attention for all patches they stand for.
        values: quantities of earlier blocks, ``[B, n, ...]``.
    """

    index: Tensor | None = None
    owner: Tensor | None = None
    sizes: Tensor | None = None
    proportional: bool = False
    values: tuple[tuple[TowerNeed, Tensor], ...] = ()

    def after(self, chosen: Selection, proportional: bool) -> State:
        """Returns the state after a selection among the tokens."""
        rows, into = chosen.rows, _into(chosen)
        sizes = self.sizes
        if sizes is None and chosen.mix is not None:
            sizes = torch.ones(into.shape, device=into.device)
        owner = into
        if self.owner is not None:
            owner = into.gather(1, self.owner.clamp(min=0)).masked_fill(self.owner < 0, -1)
        return State(
            rows if self.index is None else self.index.gather(1, rows),
            owner,
            None if sizes is None else chosen.total(sizes),
            proportional,
            tuple((need, gather_tokens(rows, value)[0]) for need, value in self.values),
        )

    def factors(self, length: int) -> Tensor | None:
        """Returns how many patches each of ``length`` tokens stands for, the prefix 1 each.

        None where it is 1 for all.

        Returns:
            ``[B, length]`` float32.
        """
        if self.sizes is None:
            return None
        return pad(self.sizes, (length - self.sizes.shape[1], 0), value=1.0)


class Passage:
    """The way of one batch after another through the blocks.

    Attributes:
        entering: the state that enters each block, and after those the one that leaves the last.
        tokens: of the last batch images and patches.
        counted: per block the tokens, prefix included, that entered attention and MLP.
        whole: whether blocks give each patch what the token that it is in has become.
    """

    def __init__(self, adapter: ViTAdapter, plan: Plan) -> None:
        self.adapter, self.plan = adapter, plan
        depth = len(adapter.blocks)
        self.entering = [State()] * (depth + 1)
        self.counted = [(0, 0)] * depth
        self.batch = self.patches = 0
        self.whole = self._was_whole = False

    @property
    def left(self) -> int:
        """Tokens that are left of the patches of each image."""
        index = self.entering[-1].index
        return self.patches if index is None else index.shape[1]

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
        entered = x.shape[1]
        if state.index is None and not self._acts(layer, x) and not self._reads(layer):
            passed, out = entered, original(x, *args, **kw)
        else:
            _refuse_masks(block, given)
            x, state = self._attend(layer, block, x, state, given.get("rope"))
            passed = x.shape[1]
            out = x + self.adapter.passed(block, x)
            out, state = self._after(layer, out, state)
        self.entering[layer + 1], self.counted[layer] = state, (entered, passed)
        return self._spread(out, state) if self.whole else out

    def _reads(self, layer: int) -> list[TowerNeed]:
        return self.plan.reads(layer, self.patches)

    def _acts(self, layer: int, x: Tensor) -> bool:
        """Whether tokens leave in a block; a count that depends on the image may be any."""
        stage = self.plan.stage(layer)
        if stage is None:
            return False
        n = x.shape[1] - self.adapter.n_prefix
        count = self.plan.known(layer, n, self.patches)
        return count is None or count < n

    def _attend(
        self, layer: int, block: Any, x: Tensor, state: State, rope: Tensor | None
    ) -> tuple[Tensor, State]:
        """Runs the first half, and what happens before the second."""
        adapter, attention = self.adapter, self.adapter.attention(block)
        normed = adapter.norm(block, x)
        q, content, v = adapter.project(attention, normed)
        k = content
        if rope is not None:
            rope = _left(rope, state.index)
            q, k = (adapter.turn(attention, part, rope) for part in (q, k))
        mask = _bias(state, q)
        read = self._read(layer, q, content, k, v, mask)
        dropped = adapter.dropout(attention) if block.training else 0.0
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropped)
        x = x + adapter.attended(block, out.transpose(1, 2).flatten(2), normed)
        state = replace(state, values=(*state.values, *read))
        stage = self.plan.stage(layer)
        return self._cut(layer, x, state) if stage and stage.before_mlp else (x, state)

    @torch.no_grad()
    def _read(
        self, layer: int, q: Tensor, content: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
    ) -> list[tuple[TowerNeed, Tensor]]:
        """Reads what is wanted of this block; keys without a rotary embedding."""
        read = []
        for need in self._reads(layer):
            if not isinstance(need, Patches):
                keys = content if isinstance(need, (Keys, WideKeys)) else k
                read.append((need, reduced(need, q, keys, v, self.adapter.n_prefix, None, mask)))
        return read

    def _after(self, layer: int, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Does what happens after a block."""
        stage, p = self.plan.stage(layer), self.adapter.n_prefix
        seen = [need for need in self._reads(layer) if isinstance(need, Patches)]
        if seen:
            values = tuple((need, x[:, p:].detach().float()) for need in seen)
            state = replace(state, values=(*state.values, *values))
        return self._cut(layer, x, state) if stage and not stage.before_mlp else (x, state)

    def _cut(self, layer: int, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Leaves what the strategy chooses, and makes of it."""
        stage, p = self.plan.stages[layer], self.adapter.n_prefix
        signals = Signals(
            x[:, p:],
            square(self.patches) if state.index is None else None,
            None,
            {need: value for need, value in state.values if need in stage.needs},
            inside=self._inside(layer, len(x)),
            n_prefix=p,
            size=state.sizes,
        )
        k = self.plan.count(layer, signals)
        with torch.no_grad():
            chosen = select_group(self.plan.strategy, signals, k)
        if chosen.is_identity:
            return x, state
        _refuse_new(self.plan.strategy.name, chosen)
        x = torch.cat([x[:, :p], chosen.apply(x[:, p:])], dim=1)
        return x, state.after(chosen, stage.proportional)

    def _inside(self, layer: int, batch: int) -> Inside | None:
        """Returns where a stage acts; None for one that acts once, on the output of all blocks."""
        layers, depth = tuple(self.plan.stages), len(self.adapter.blocks)
        if layers == (depth - 1,) and not self.plan.stages[layer].before_mlp:
            return None
        return Inside(layers.index(layer), layers, depth, (self.patches,) * batch)

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
        """Returns the states, scaled so that their mean counts every patch."""
        factors = self._factors(x.shape[1])
        if factors is None:
            return x
        first = 0 if self.adapter.mean_has_prefix else self.adapter.n_prefix
        part = factors[:, first:]
        share = part * (part.shape[1] / part.sum(1, keepdim=True))
        factors = torch.cat([factors[:, :first], share], dim=1)
        return x * factors[..., None].to(x.dtype)

    def bias(self, length: int) -> Tensor | None:
        """Returns what keys of ``length`` tokens get added, ``[B, length]`` float32, or None."""
        factors = self._factors(length)
        return None if factors is None else factors.log()

    def _factors(self, length: int) -> Tensor | None:
        return None if self._was_whole else self.entering[-1].factors(length)


def _into(chosen: Selection) -> Tensor:
    """Returns the output that each token goes into, ``[B, n]`` int64, -1 = none."""
    batch, k = chosen.rows.shape
    into = torch.full((batch, chosen.n), -1, device=chosen.rows.device)
    if chosen.mix is not None:
        return into.scatter(1, chosen.mix.source, chosen.mix.target)
    return into.scatter(1, chosen.rows, torch.arange(k, device=into.device).expand(batch, k))


def _bias(state: State, q: Tensor) -> Tensor | None:
    """Returns what keys get added, ``[B, 1, 1, S]`` in the dtype of ``q``, or None."""
    factors = state.factors(q.shape[2]) if state.proportional else None
    return None if factors is None else factors.log().to(q.dtype)[:, None, None]


def _left(rope: Tensor, index: Tensor | None) -> Tensor:
    """Returns the rotary embedding of the tokens that are left.

    Args:
        rope: ``[N, e]``, or ``[H, N, e]`` where heads have their own.
        index: ``[B, n]`` patches, None = all.

    Raises:
        UnsupportedError: it has other dimensions.
    """
    if index is None:
        return rope
    if rope.ndim == 2:
        return rope[index][:, None]
    if rope.ndim == 3:
        return rope[:, index].transpose(0, 1)
    raise UnsupportedError(
        f"The rotary embedding is {list(rope.shape)}; known are [N, e] and [H, N, e]. Give images "
        "of one size."
    )


def _refuse_masks(block: Any, given: dict[str, Any]) -> None:
    masks = {k: v for k, v in given.items() if isinstance(v, Tensor) and k != "rope"}
    odd = [*masks, *(["is_causal"] if given.get("is_causal") else [])]
    if odd:
        raise UnsupportedError(
            f"{type(block).__name__} was given {', '.join(odd)}, which cannot follow the tokens "
            "that leave. Leave it out, or remove() the handle for this call."
        )


def _refuse_new(name: str, chosen: Selection) -> None:
    """Raises UnsupportedError where an output is made of prefix tokens, or has no patch's place."""
    if torch.compiler.is_compiling() or chosen.mix is None:
        return
    if chosen.n_prefix or bool((chosen.rows < 0).any()):
        raise UnsupportedError(
            f"{name} makes tokens of [CLS], or new ones; in a ViT patches can only leave or merge "
            "into others. Use another strategy, such as 'tome'."
        )


def selections(state: State, batch: int, n: int) -> list[Selection]:
    """Returns per image what is left of its ``n`` patches, in the order of their places."""
    if state.index is None or state.owner is None:
        return [Selection.all(1, n, torch.device("cpu"))] * batch
    return [_selection(row, owner) for row, owner in zip(state.index, state.owner, strict=True)]


def _selection(index: Tensor, owner: Tensor) -> Selection:
    rows, order = index.sort()
    place = order.argsort()
    source = (owner >= 0).nonzero()[:, 0]
    if len(source) == len(rows):
        return Selection(rows[None], len(owner))
    target = place[owner[source]]
    weight = 1 / torch.bincount(target, minlength=len(rows)).float()[target]
    return Selection(rows[None], len(owner), Mix(source[None], target[None], weight[None]))
