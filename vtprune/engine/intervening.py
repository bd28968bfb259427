"""Interventions: in some layers of the language model attention rows are edited; no token leaves.

The attention tap hands on the model's own attention, and the rows that an edit is for are made
anew, while the prompt is read and while tokens are decoded. In place of a prompt's attention may
also stand one that leaves pairs out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtprune.engine import tap
from vtprune.engine.computing import Computing, part_of
from vtprune.engine.cuts import Cut
from vtprune.engine.decoding import Decoding
from vtprune.engine.editing import Edit, Seen, edited
from vtprune.engine.report import RuleReport
from vtprune.engine.signals import Step
from vtprune.engine.timing import part
from vtprune.errors import ConfigError, HookError, UnsupportedError
from vtprune.interventions import Entering, Intervention, Keys, Queries, SparsePrefill
from vtprune.types import RowRule, TowerNeed

Forward = Callable[..., tuple[Tensor, Any]]
MASKED = ("eager", "sdpa", "flash_attention_2", "flash_attention_3")


class Intervening:
    """The interventions of one handle in its language model.

    Args:
        layers: its decoder layers in order; ``steps`` of which some intervene, in their order.
        current: returns the running call's ``Decoding``, or None to leave a call alone.

    Attributes:
        inner: the row rules among the ``steps``, which come first.
    """

    def __init__(
        self,
        layers: Sequence[Any],
        steps: Sequence[Step],
        current: Callable[[], Decoding | None],
    ) -> None:
        self.layers, self.current = layers, current
        every = [(step.stage.layer or 0, step.stage.rule) for step in steps]
        rows = {number: rule for number, rule in every if isinstance(rule, RowRule)}
        self.inner = Computing(layers, rows, current)
        self.rules: dict[int, list[Intervention | SparsePrefill]] = {}
        for number, rule in sorted(every, key=lambda pair: pair[0]):
            if isinstance(rule, (Intervention, SparsePrefill)):
                self.rules.setdefault(number, []).append(rule)
        self.attention = {part_of(layers[number], "self_attn"): number for number in self.rules}
        self._went_by: dict[int, int] = {}  # before the running call of a layer with a window

    @property
    def needs(self) -> tuple[TowerNeed, ...]:
        """What the rules read in the tower, each once."""
        own = [need for some in self.rules.values() for rule in some for need in rule.needs]
        return tuple(dict.fromkeys([*self.inner.needs, *own]))

    def _needs(self, number: int) -> set[TowerNeed]:
        return {need for rule in self.rules[number] for need in rule.needs}

    @property
    def acts(self) -> bool:
        """Whether there is any rule."""
        return bool(self.rules or self.inner.rules)

    def install(self, undo: ExitStack) -> None:
        """Registers the hooks, those of the row rules too; ``undo`` takes them off.

        Raises:
            ConfigError: heads that a layer does not have.
            UnsupportedError: an attention whose masks cannot be read.
        """
        self.inner.install(undo)
        for number, rules in self.rules.items():
            layer = self.layers[number]
            attention = layer.self_attn
            implementation = attention.config._attn_implementation
            if implementation not in MASKED:
                raise UnsupportedError(
                    f"Attention implementation {implementation!r} does not say by its mask what a "
                    "query sees. Load the model with attn_implementation='sdpa'."
                )
            _check_heads(number, attention.config.num_attention_heads, rules)
            hook = layer.register_forward_pre_hook(self._enter(number), with_kwargs=True)
            undo.callback(hook.remove)
            undo.callback(attention.register_forward_hook(self._check(number)).remove)

    def _enter(self, number: int) -> Callable[..., None]:
        """Returns a hook that marks the tokens of the prompt that enter a layer."""

        def before(module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
            decoding, cache = self.current(), kwargs.get("past_key_values")
            if decoding is None or tap.is_reading():
                return
            if getattr(self.layers[number].self_attn, "sliding_window", None) and cache is not None:
                self._went_by[number] = cache.get_seq_length(number)
            if not decoding.prefilled:
                hidden = args[0] if args else kwargs["hidden_states"]
                with torch.no_grad(), part("score"):
                    decoding.marks[number] = self._marks(number, decoding, hidden)

        return before

    def _check(self, number: int) -> Callable[..., None]:
        """Returns a hook that raises where attention went another way than by the tap."""

        def after(module: nn.Module, args: Any, output: Any) -> None:
            decoding = self.current()
            if decoding is None or tap.is_reading() or number in decoding.acted:
                return
            raise HookError(
                f"{type(module).__name__} did not call the attention interface. Use a language "
                "model whose attention is sdpa or eager."
            )

        return after

    def _marks(self, number: int, decoding: Decoding, hidden: Tensor) -> list[tuple[Tensor, ...]]:
        """Returns per rule the marked columns of the prompt, each ``[B, L]`` bool."""
        if decoding.whose is None:
            raise HookError(f"Layer {number} reads a prompt, but nobody knows its images.")
        columns, device = _columns_of(decoding.cut(number), decoding, hidden.device), hidden.device
        index, valid = columns.index.clamp(min=0), columns.valid

        def at(x: Tensor) -> Tensor:
            rows = index.reshape(*index.shape, *[1] * (x.ndim - 2)).expand(-1, -1, *x.shape[2:])
            return x.to(device).gather(1, rows)

        whose = at(decoding.whose().repeat_interleave(decoding.copies, dim=0))
        entering = Entering(
            hidden,
            valid,
            columns.of(decoding.visual.to(device)),
            columns.of(_first(decoding).to(device)),
            whose.masked_fill(~valid, -1),
            {need: at(decoding.rows[need]) for need in self._needs(number)},
        )
        made = []
        for rule in self.rules[number]:
            marks = rule.editor.mark(entering) if isinstance(rule, Intervention) else ()
            made.append(tuple(columns.spread(mark & valid, columns.length) for mark in marks))
        return made

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
        """Returns what attention gives, ``[B, L, H, d]``, by the rules of the module's layer."""
        number, decoding = self.attention.get(module), self.current()
        given = module, query, key, value, mask
        call = partial(self.inner.attend, forward, *given, *args, **kwargs)
        if number is None or decoding is None or tap.is_reading():
            return call()
        tap._refuse_changed(module, kwargs)
        decoding.acted.add(number)
        seen = Seen.by(mask, module, query, key, kwargs.get("is_causal"))
        scale = kwargs.get("scaling")
        sparse = next((x for x in self.rules[number] if isinstance(x, SparsePrefill)), None)
        if sparse is not None and decoding.prefilled:
            return call()
        if sparse is not None:
            made = self._sparse(sparse, number, decoding, query, key, value, seen, scale)
            return call() if made is None else (made, None)
        edits = self._edits(number, decoding, query, key)
        out, weights = call()
        if not edits:
            return out, weights
        dropout = kwargs.get("dropout") or 0.0
        out, weights, macs = edited(edits, (out, weights), query, key, value, seen, scale, dropout)
        decoding.spared -= 0 if decoding.prefilled else macs
        return out, weights

    def _edits(self, number: int, decoding: Decoding, query: Tensor, key: Tensor) -> list[Edit]:
        """Returns what is to be edited now, with what is known of the keys."""
        columns, device, found = self._columns(number, decoding, query, key), query.device, []
        visual, first = (
            columns.of(x.to(device))[:, None, None] for x in (decoding.visual, _first(decoding))
        )
        for rule, marks in zip(self.rules[number], decoding.marks[number], strict=True):
            if isinstance(rule, Intervention) and (rule.decoded or not decoding.prefilled):
                own = tuple(columns.of(mark.to(device))[:, None, None] for mark in marks)
                rows = _asking(rule.queries, columns, query.shape[2], decoding)
                found.append(Edit(rule, Keys(visual, first, own), rows))
        return found

    def _columns(self, number: int, decoding: Decoding, query: Tensor, key: Tensor) -> Cut:
        """Returns of which columns of the prompt the keys are, -1 = of none.

        Raises:
            UnsupportedError: other rows than those of the prompt.
        """
        if len(query) != len(decoding.valid):
            raise UnsupportedError(
                f"Layer {number} was called with {len(query)} rows, but the prompt was read with "
                f"{len(decoding.valid)}. Repeat the prompt's rows before it is read."
            )
        known = decoding.cached(number) if decoding.prefilled else decoding.cut(number)
        cut = _columns_of(known, decoding, query.device)
        length = decoding.valid.shape[1]
        index = cut.index.masked_fill(cut.index >= length, -1)  # decoded ones that settled
        total = max(self._went_by.pop(number, 0) + query.shape[2], key.shape[2])
        index = F.pad(index, (0, total - index.shape[1]), value=-1)
        return Cut(index[:, -key.shape[2] :], length)  # a window forgets from the left

    def _sparse(
        self,
        rule: SparsePrefill,
        number: int,
        decoding: Decoding,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        seen: Seen,
        scale: float | None,
    ) -> Tensor | None:
        """Returns attention of the prompts ``[B, L, H, d]``; None = it is whole in all of them."""
        columns = _columns_of(decoding.cut(number), decoding, query.device)
        visual = columns.of(decoding.visual.to(query.device))
        out, shares, whole = torch.zeros_like(query.transpose(1, 2)), [], True
        for b, valid in enumerate(columns.valid):
            spots, image = valid.nonzero()[:, 0], visual[b].nonzero()[-1:, 0]
            _refuse_order(number, seen, b, spots)
            q, k, v = (x[b : b + 1, :, spots] for x in (query, key, value))
            after, found = int((spots > image).sum()), None
            if len(image):  # a prompt without visual tokens is left alone
                found = rule.attender.attend(q, k, v, scale, after)
            whole = whole and found is None
            made, share = found or (_dense(q, k, v, scale), q.new_ones((), dtype=torch.float32))
            out[b, spots] = made[0].transpose(0, 1).to(out)
            shares.append(share)
        decoding.densities[number] = torch.stack(shares)
        return None if whole else out

    def report(self, decoding: Decoding | None) -> RuleReport | None:
        """Returns what all rules are, and what the last call's prompt computed by them."""
        return self.inner.report(decoding, self.rules)


def _columns_of(cut: Cut | None, decoding: Decoding, device: torch.device) -> Cut:
    return (cut or Cut.whole(decoding.valid)).to(device)


def _first(decoding: Decoding) -> Tensor:
    """Returns the first token of each prompt, ``[B, L]`` bool."""
    return decoding.valid & (decoding.valid.long().cumsum(1) == 1)


def _asking(queries: Queries, columns: Cut, n: int, decoding: Decoding) -> Tensor:
    """Returns which of ``n`` queries are edited, ``[B, n]`` bool; no row without an image."""
    visual = decoding.visual.to(columns.index.device)
    some, place = visual.any(1, keepdim=True), torch.arange(visual.shape[1], device=visual.device)
    if decoding.prefilled:
        new = some.expand(-1, n)
        last = torch.arange(n, device=visual.device) == n - 1
        return {"visual": new & False, "last": new & last}.get(queries, new)
    index = columns.index[:, :n]
    image = (place * visual).amax(1, keepdim=True)
    asked = {
        "text": index > image,
        "last": (index == index.amax(1, keepdim=True)),
        "visual": Cut(index, columns.length).of(visual),
    }
    return some & (index >= 0) & asked.get(queries, index >= 0)


def _dense(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """Returns causal attention ``[1, H, n, d]`` of one prompt."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)


def _refuse_order(number: int, seen: Seen, b: int, spots: Tensor) -> None:
    """Raises UnsupportedError where a prompt's tokens do not see just those before them."""
    sees = seen.row(b, spots)
    if not bool((sees == torch.ones_like(sees).tril()).all()):
        raise UnsupportedError(
            f"Layer {number} does not attend in the order of tokens (a window, or images that see "
            "themselves whole), for which there is no sparse attention. Give layers= that do."
        )


def _check_heads(number: int, n: int, rules: Sequence[Any]) -> None:
    """Raises ConfigError for heads that a layer does not have."""
    for rule in rules:
        heads = getattr(rule, "heads", None) or ()
        if any(head >= n for head in heads):
            raise ConfigError(f"heads={tuple(heads)}: layer {number} has heads 0 to {n - 1}.")
