"""Row rules: in some layers of the language model visual rows compute less; no token leaves.

Hooks on a layer's projections and on its MLP take the rows that pass and give the others zeros; the
attention tap hands on the queries that are left. While tokens are decoded nothing of this acts:
they find keys and values of all tokens, but for what a rule drops from a cache or packs there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from vtprune.engine import tap
from vtprune.engine.choosing import among_chosen, settle, settle_again
from vtprune.engine.decoding import Decoding
from vtprune.engine.masks import explicit, windowed
from vtprune.engine.places import near
from vtprune.engine.report import RuleReport
from vtprune.engine.split import Split
from vtprune.engine.thin import thin
from vtprune.engine.work import macs_per_row, published, whole
from vtprune.errors import ConfigError, HookError, UnsupportedError
from vtprune.rules import RowRule
from vtprune.types import TowerNeed

Forward = Callable[..., tuple[Tensor, Any]]


class Computing:
    """The rules of one handle in its language model.

    Args:
        layers: its decoder layers in order; ``rules`` by their numbers.
        current: returns the running call's ``Decoding``, or None to leave a call alone.
    """

    def __init__(
        self,
        layers: Sequence[Any],
        rules: Mapping[int, RowRule],
        current: Callable[[], Decoding | None],
    ) -> None:
        self.layers, self.rules, self.current = layers, dict(sorted(rules.items())), current
        self.attention = {part_of(layers[number], "self_attn"): number for number in rules}

    @property
    def choosing(self) -> tuple[int, ...]:
        """Layers in which it is chosen who attends."""
        return tuple(n for n, rule in self.rules.items() if rule.chooser is not None)

    @property
    def needs(self) -> tuple[TowerNeed, ...]:
        """What the rules read in the tower, each once."""
        return tuple(dict.fromkeys(need for rule in self.rules.values() for need in rule.needs))

    def install(self, undo: ExitStack) -> None:
        """Registers the hooks; ``undo`` takes them off.

        Raises:
            UnsupportedError: a layer does not have the parts, or the attention, that it takes.
        """
        for number, rule in self.rules.items():
            layer = self.layers[number]
            attention = layer.self_attn
            implementation = attention.config._attn_implementation
            if rule.attend != "all" and implementation not in ("eager", "sdpa"):
                raise UnsupportedError(
                    f"Attention implementation {implementation!r} takes no mask for some of the "
                    "queries. Load the model with attn_implementation='sdpa'."
                )
            if rule.maker is not None:
                hook = layer.register_forward_pre_hook(self._made(number), with_kwargs=True)
                undo.callback(hook.remove)
            if rule.attend != "all":
                undo.callback(attention.register_forward_hook(self._check(number)).remove)
            if rule.others != "keep":
                hook = attention.register_forward_hook(self._settle(number), with_kwargs=True)
                undo.callback(hook.remove)
            if rule.attend in ("none", "self") and hasattr(attention, "q_proj"):
                self._pass(undo, number, attention.q_proj)
            if rule.attend == "none":
                self._pass(undo, number, part_of(attention, "o_proj"))
            if not rule.read:
                self._pass(undo, number, part_of(attention, "v_proj"))
            if rule.mlp < 1:
                self._pass(undo, number, part_of(layer, "mlp"), rule.mlp)
            if rule.heads is not None:
                self._drop_heads(undo, number, rule.heads)

    def _pass(self, undo: ExitStack, number: int, module: nn.Module, share: float = 0.0) -> None:
        """Lets the rows that are not visual pass ``module``, and the others a ``share`` of it.

        What nothing of it gives is 0.
        """
        cost = (1 - share) * macs_per_row(module, self.layers[number].self_attn.config)
        small = thin(module, share) if share else None
        others: list[Tensor] = []

        def before(module: nn.Module, args: tuple[Tensor, ...]) -> Any:
            found = self._split(number, args[0].device)
            if found is None:
                return None
            decoding, split = found
            decoding.spared += cost * (split.visual.numel() - len(split.passing))
            if small is not None:
                others.append(small(args[0][split.visual]))
            return (split.gather(args[0]), *args[1:])

        def after(module: nn.Module, args: Any, output: Any) -> Any:
            # In some releases a mixture of experts returns what its router said too.
            made, *more = output if isinstance(output, tuple) else (output,)
            found = self._split(number, made.device)
            if found is None:
                return None
            full = found[1].scatter(made)
            if others:
                full[found[1].visual] = others.pop()
            return (full, *more) if more else full

        undo.callback(module.register_forward_pre_hook(before).remove)
        undo.callback(module.register_forward_hook(after).remove)

    def _check(self, number: int) -> Callable[..., None]:
        """Returns a hook that raises where attention went another way than by the tap."""

        def after(module: nn.Module, args: Any, output: Any) -> None:
            decoding = self.current()
            if decoding is None or decoding.prefilled or number in decoding.acted:
                return
            raise HookError(
                f"{type(module).__name__} did not call the attention interface. Use a language "
                "model whose attention is sdpa or eager."
            )

        return after

    def _made(self, number: int) -> Callable[..., Any]:
        """Returns a hook that puts what the rule's maker makes in the place of visual rows."""
        maker = self.rules[number].maker

        def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            found = self._split(number, hidden.device)
            if found is None or maker is None:
                return None
            decoding, split = found
            features, cut = decoding.rows[maker.need].to(hidden.device), decoding.cut(number)
            if cut is not None:
                index = cut.index.clamp(min=0).to(hidden.device)
                features = features.gather(1, index[..., None].expand(-1, -1, features.shape[2]))
            rows = split.visual & ~features[..., 0].isnan()
            made, hidden = maker.make(features[rows], hidden.shape[2]), hidden.clone()
            hidden[rows] = made.to(hidden)
            decoding.spared -= maker.macs() * len(made)
            rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
            return (hidden, *args[1:]), rest

        return before

    def _settle(self, number: int) -> Callable[..., None]:
        """Returns a hook that drops or packs in the cache what the rule says."""

        def after(module: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
            decoding, cache = self.current(), kwargs.get("past_key_values")
            if decoding is None or decoding.prefilled or tap.is_reading() or cache is None:
                return
            settle(cache, number, decoding, self.rules[number])

        return after

    def _drop_heads(self, undo: ExitStack, number: int, heads: Sequence[int]) -> None:
        """Makes the values of visual rows 0, and what they attend to, but in these heads."""
        attention = self.layers[number].self_attn
        n = attention.config.num_key_value_heads
        if not set(heads) <= set(range(n)):
            raise ConfigError(f"heads={tuple(heads)}: layer {number} has heads 0 to {n - 1}.")
        keeps = torch.zeros(n, dtype=torch.bool)
        keeps[list(heads)] = True

        def only(x: Tensor) -> Tensor:
            found = self._split(number, x.device)
            if found is None:
                return x
            gone = found[1].visual[:, :, None] & ~keeps.to(x.device)
            return x.unflatten(2, (n, -1)).masked_fill(gone[..., None], 0.0).flatten(2)

        def values(module: nn.Module, args: Any, output: Any) -> Tensor:
            return only(output)

        def answers(module: nn.Module, args: Any) -> Tensor:
            return only(args[0])

        undo.callback(part_of(attention, "v_proj").register_forward_hook(values).remove)
        if self.rules[number].attend != "none":
            undo.callback(part_of(attention, "o_proj").register_forward_pre_hook(answers).remove)

    def _split(self, number: int, device: torch.device) -> tuple[Decoding, Split] | None:
        """Returns which rows of a layer are visual while it computes for the prompt, else None."""
        decoding = self.current()
        if decoding is None or decoding.prefilled or tap.is_reading():
            return None
        at = _cut_of(decoding, number)
        if at not in decoding.splits:
            cut = decoding.cut(number)
            visual = decoding.visual if cut is None else cut.of(decoding.visual)
            decoding.splits[at] = Split.of(visual)
        return decoding, decoding.splits[at].to(device)

    def attend(
        self,
        forward: Forward,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Any]:
        """Returns what attention gives, ``[B, L, H, d]``, by the rule of the module's layer."""
        number = self.attention.get(module)
        found = None if number is None else self._split(number, query.device)
        if number is None or found is None or self.rules[number].attend == "all":
            if number is not None:
                self._settle_again(number, query, key, mask, kwargs.get("scaling"))
            return forward(module, query, key, value, mask, *args, **kwargs)
        decoding, split = found
        decoding.acted.add(number)
        chooser = self.rules[number].chooser
        if chooser is not None:
            return among_chosen(
                number, decoding, chooser, forward, module, query, key, value, mask, *args, **kwargs
            )
        seen = explicit(mask, module, query, key, kwargs)
        if self.rules[number].attend == "window":
            seen = windowed(seen, split.visual, self._close(number, decoding).to(seen.device))
            return forward(module, query, key, value, seen, *args, **kwargs)
        asked = split.queries(query)
        out, weights = forward(module, asked, key, value, split.mask(seen), *args, **kwargs)
        left_out = (query.shape[2] - asked.shape[2]) * query.shape[2]
        decoding.spared += 2 * left_out * query[:, :, 0].numel()
        full = split.answers(out)
        if self.rules[number].attend == "self":
            own = value[:, :, : query.shape[2]].transpose(1, 2)
            own = own.repeat_interleave(query.shape[1] // value.shape[1], dim=2)
            full = torch.where(split.visual[:, :, None, None], own, full)
        return full, weights

    def _settle_again(
        self, number: int, query: Tensor, key: Tensor, mask: Tensor | None, scale: float | None
    ) -> None:
        """Does so with what was decoded, once there is enough of it."""
        decoding, rule = self.current(), self.rules[number]
        if decoding is None or not decoding.prefilled or tap.is_reading():
            return
        held = decoding.held.get(number)
        if held is not None and rule.chooser and rule.every and held.seen >= rule.every:
            settle_again(held, rule.chooser, query, key, mask, scale)

    def _close(self, number: int, decoding: Decoding) -> Tensor:
        """Returns which tokens are in each other's window, ``[B, L, L]`` bool."""
        if decoding.where is None:
            raise HookError(f"Layer {number} has a window, but nobody knows where tokens are.")
        at, radius, cut = _cut_of(decoding, number), self.rules[number].radius, decoding.cut(number)
        if (at, radius) not in decoding.windows:
            where = decoding.where().repeat_interleave(decoding.copies, dim=0)
            if cut is not None:
                index = cut.index.clamp(min=0).to(where.device)
                where = where.gather(1, index[:, :, None].expand(-1, -1, 4))
            decoding.windows[at, radius] = near(where, radius)
        return decoding.windows[at, radius]

    def report(
        self, decoding: Decoding | None, others: Mapping[int, Sequence[object]]
    ) -> RuleReport | None:
        """Returns what the rules are, and what the last call's prompt computed by them.

        Args:
            others: rules of another kind, by layer.
        """
        said: dict[str, list[int]] = {}
        every = [(number, [rule]) for number, rule in self.rules.items()]
        for number, rules in [*every, *others.items()]:
            for rule in rules:
                said.setdefault(str(rule), []).append(number)
        if not said:
            return None
        layers = {rule: tuple(numbers) for rule, numbers in said.items()}
        if decoding is None:
            return RuleReport(layers)
        realised = 1 - decoding.spared / whole(self.layers, decoding)
        shares = {n: share.mean().item() for n, share in decoding.densities.items()}
        return RuleReport(layers, published(self.layers, self.rules, decoding), realised, shares)


def _cut_of(decoding: Decoding, number: int) -> int:
    """Returns the layer of the cut that a layer sees, -1 = none."""
    return max((layer for layer in decoding.cuts if layer <= number), default=-1)


def part_of(module: nn.Module, name: str) -> nn.Module:
    """Returns the part of a layer of this name.

    Raises:
        UnsupportedError: there is none.
    """
    part = getattr(module, name, None)
    if part is None:
        have = ", ".join(child for child, _ in module.named_children())
        raise UnsupportedError(
            f"{type(module).__name__} has no {name!r} by which rows could be left out; it has "
            f"{have}. Use a strategy that drops tokens, such as 'fastv'."
        )
    return part
