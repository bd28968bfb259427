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
from torch.nn.functional import dropout

from vtprune.engine.vit_attention import Parts, merged
from vtprune.engine.vit_choice import choose
from vtprune.engine.vit_plan import Plan
from vtprune.engine.vit_state import State
from vtprune.errors import ConfigError, UnsupportedError
from vtprune.kernels.gather_tokens import gather_tokens
from vtprune.types import Patches, Selection, Signals, Stage, TowerNeed
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
        self._added = self._checked(plan.strategy.guests(adapter.facts))
        self._guests: Tensor | None = None

    def _checked(self, added: Tensor | None) -> Tensor | None:
        """Returns what the strategy's token gets added.

        Raises:
            ConfigError: it is of other blocks, or of another width.
        """
        depth, width = len(self.adapter.blocks), self.adapter.shape.width
        if added is None or tuple(added.shape) in ((depth, width), (depth, 1)):
            return added
        raise ConfigError(
            f"{self.plan.strategy.name} adds {list(added.shape)} to a token of its own; "
            f"{self.adapter.facts.family} has {depth} blocks of width {width}. Give weights that "
            "were trained for this model."
        )

    @property
    def _prefix(self) -> int:
        """Tokens before the first patch, that of the strategy among them."""
        return self.adapter.n_prefix + (self._guests is not None)

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
            self._guests = None if self.plan.idle(self.patches) else self._added
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
        adapter, stage, rule = self.adapter, self.plan.stage(layer), self.plan.rule(layer)
        parts = Parts.of(adapter, layer, x, state, rope, self._prefix)
        if rule is not None:
            parts = parts.by(rule)
            self.shares[layer] = 1.0 if parts.ruled is None else parts.ruled.share
        needs = [need for need in self._reads(layer) if not isinstance(need, Patches)]
        state = parts.state.reading((need, parts.read(need)) for need in needs)
        dropped = adapter.dropout(adapter.attention(block)) if block.training else 0.0
        normed = parts.x
        if stage and stage.ahead:
            x, state, chosen = self._cut(layer, stage, x, state)
            weights = dropout(merged(parts.map(), chosen, self._prefix), dropped)
            normed = adapter.norm(block, x)
            v = adapter.project(adapter.attention(block), normed)[2]
            out = weights.to(v.dtype) @ v
        else:
            out = parts.attend(dropped)
        x = x + adapter.attended(block, out.transpose(1, 2).flatten(2), normed)
        return self._cut(layer, stage, x, state)[:2] if stage and stage.before_mlp else (x, state)

    def _after(self, layer: int, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Does what happens after a block."""
        stage, p = self.plan.stage(layer), self._prefix
        seen = [need for need in self._reads(layer) if isinstance(need, Patches)]
        state = state.reading((need, x[:, p:].detach().float()) for need in seen)
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
