"""Looks on while a model generates: what each new token attends to, and what enters each layer.

Of each call the last query alone is read, through the tap, so memory grows with the length of the
prompt and not with its square. Nothing is changed or ended: a handle acts as it does unwatched.
B prompts, L columns of what the caller gave, H heads.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtprune.engine import tap
from vtprune.engine.inputs import valid_tokens, visual
from vtprune.engine.plan import find_adapter
from vtprune.engine.wrap import Handle
from vtprune.errors import HookError
from vtprune.kernels._common import full_precision

Score = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Seen:
    """What one call showed, on the CPU. NL layers; a token that has left is not ``there``.

    Attributes:
        attention: ``[NL, B, L]`` float32, that the tokens of the prompt get from generated ones,
            mean over heads and over these; what goes to generated ones is left out.
        entropy: ``[NL, B]`` float32 of those rows, in nats, mean over heads and rows.
        there: ``[NL, B, L]`` bool, the tokens that these rows could attend to.
        scores: ``[NL, B, L]`` float32, of what entered the layer; NaN where nothing did.
        valid, visual: ``[B, L]`` bool, tokens of the prompt, and visual ones.
        rows: ``[B]`` generated tokens that were read; 0 = the last one of the prompt was.
        mixed: ``[NL]`` bool, layers in whose caches heads hold different visual tokens: of these
            it is known there what they get together, and not which of them gets what.
    """

    attention: Tensor
    entropy: Tensor
    there: Tensor
    scores: Tensor
    valid: Tensor
    visual: Tensor
    rows: Tensor
    mixed: Tensor


class Onlooker:
    """Watches one ``generate`` of a model, wrapped or not, whose prompts are padded on the left.

    Args:
        model: of which the decoder is watched.
        inputs: what ``generate`` is called with.
        score: makes ``[B, n]`` of the hidden states ``[B, n, C]`` that enter a layer.
        handle: the model's, if it is wrapped.
    """

    looks_on = True  # for the tap: what it reads are the model's own calls

    def __init__(
        self, model: Any, inputs: Mapping[str, Any], score: Score, handle: Handle | None = None
    ) -> None:
        self.adapter, self.score, self.handle = find_adapter(model), score, handle
        ids = inputs["input_ids"]
        self.valid, self.visual = valid_tokens(inputs, None), visual(self.adapter, ids)
        layers: list[Any] = list(self.adapter.decoder)
        self.numbers: dict[nn.Module, int] = {x.self_attn: i for i, x in enumerate(layers)}
        self._layers = layers
        self._prompt: dict[int, tuple[Tensor, Tensor]] = {}  # rows [B, H, n], their columns
        self._steps: dict[int, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        self._there: dict[int, Tensor] = {}
        self._scores: dict[int, Tensor] = {}

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Watches the one call that is made inside."""
        implementation = self.adapter.language_model.config._attn_implementation or "eager"
        with ExitStack() as undo:
            tap.install(implementation)
            undo.callback(tap.uninstall, implementation)
            for number, layer in enumerate(self._layers):
                hook = layer.register_forward_pre_hook(self._enter(number), with_kwargs=True)
                undo.callback(hook.remove)
            undo.enter_context(tap.reading(self))
            yield

    def reads(self, module: nn.Module) -> bool:
        """Returns whether it is an attention module of the decoder."""
        return module in self.numbers

    @torch.no_grad()
    def read(
        self,
        module: nn.Module,
        q: Tensor,
        k: Tensor,
        mask: Tensor | None,
        scale: float | None,
        v: Tensor | None = None,
    ) -> None:
        """Takes what the last of the queries ``[B, H, m, d]`` attends to."""
        number = self.numbers[module]
        rows, columns = last_rows(q, k, mask, scale), self._columns(number, k.shape[2])
        if number not in self._prompt:
            self._prompt[number] = rows, columns
            return
        self._there.setdefault(number, self._spread(columns >= 0, columns).cpu())
        self._steps[number].append(self._reduce(rows, columns))

    def seen(self, new: Tensor, ends: Collection[int]) -> Seen:
        """Returns what was seen once ``generate`` has given the tokens ``new`` ``[B, T]``.

        Rows after one of the ids ``ends`` count nothing; of a prompt that was answered with such
        an id alone the last token is read.

        Raises:
            HookError: not every layer was called for the prompt, and once per token after it.
        """
        steps = {len(self._steps[number]) for number in range(len(self._layers))}
        if len(self._prompt) < len(self._layers) or steps != {new.shape[1] - 1}:
            raise HookError(
                f"{type(self.adapter.model).__name__} did not call the attention interface once "
                "per layer and token. Use a language model whose attention is sdpa or eager, and "
                "greedy decoding without an assistant."
            )
        over = torch.isin(new.cpu(), torch.tensor(sorted(ends), dtype=torch.long)).cumsum(1) > 0
        alive = (~over[:, :-1]).float()  # the last token was never given to the model
        count = alive.sum(1)
        found = [self._mean(number, alive, count) for number in range(len(self._layers))]
        attention, entropy, there = (torch.stack(parts) for parts in zip(*found, strict=True))
        scores = torch.stack([self._scores[number] for number in range(len(self._layers))])
        masks = self.valid.cpu(), self.visual.cpu()
        return Seen(attention, entropy, there, scores, *masks, count.long(), self._mixed())

    def _mixed(self) -> Tensor:
        evicting = () if self.handle is None else self.handle._evicting.steps
        return torch.tensor([number in evicting for number in range(len(self._layers))])

    def _mean(self, number: int, alive: Tensor, count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns attention, entropy and who is there, of generated tokens or of the last one."""
        rows, columns = self._chosen(number, *self._prompt[number])
        attention, entropy = self._reduce(rows, columns)
        there = self._spread(columns >= 0, columns).cpu()
        if not self._steps[number]:
            return attention, entropy, there
        weight = alive / count.clamp(min=1)[:, None]  # [B, T - 1]
        some = count > 0
        rows, entropies = (
            torch.stack(parts, 1) for parts in zip(*self._steps[number], strict=True)
        )
        return (
            torch.where(some[:, None], (weight[:, :, None] * rows).sum(1), attention),
            torch.where(some, (weight * entropies).sum(1), entropy),
            torch.where(some[:, None], self._there[number], there),
        )

    def _chosen(self, number: int, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Leaves out of the prompt's rows what a rule had chosen not to attend to."""
        decoding = None if self.handle is None else self.handle._decoding
        chosen = None if decoding is None else decoding.chosen.get(number)
        if chosen is None:
            return rows, columns
        own = self._of_caller(chosen.index)
        marks = self._spread(own >= 0, own)
        stays = (columns >= 0) & marks.gather(1, columns.clamp(min=0))
        rows = rows * stays[:, None].to(rows.device)
        return rows / rows.sum(-1, keepdim=True), columns.masked_fill(~stays, -1)

    def _enter(self, number: int) -> Callable[..., None]:
        """Returns a hook that scores what enters a layer, for the prompt alone."""

        @torch.no_grad()
        def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            if number not in self._scores:
                hidden = args[0] if args else kwargs["hidden_states"]
                columns = self._columns(number, hidden.shape[1])
                scores = self.score(hidden).float().to(columns.device)
                empty = scores.new_full(self.valid.shape, torch.nan)
                self._scores[number] = self._spread(scores, columns, empty).cpu()

        return before

    def _columns(self, number: int, n: int) -> Tensor:
        """Returns the caller's column of each of ``n`` keys of a layer, ``[B, n]``.

        -1 = padding, or a token that was decoded.
        """
        decoding = None if self.handle is None else self.handle._decoding
        cut = held = None
        if decoding is not None:
            held = decoding.held.get(number)
            cut = decoding.cached(number) if decoding.prefilled else decoding.cut(number)
        index = self._of_caller(None if cut is None else cut.index)
        after = len(self._steps[number]) + (number in self._prompt)
        total = n if held is not None else max(n, index.shape[1] + after)
        index = F.pad(index, (0, total - index.shape[1]), value=-1)
        return index[:, -n:]  # a window forgets from the left

    def _of_caller(self, index: Tensor | None) -> Tensor:
        """Returns the caller's columns at ``index`` ``[B, m]`` of what the model got."""
        here = None if self.handle is None else self.handle.index
        if here is None:
            every = torch.arange(self.valid.shape[1], device=self.valid.device)
            here = every.masked_fill(~self.valid, -1)
        if index is None:
            return here
        index = index.to(here.device)
        known = (index >= 0) & (index < here.shape[1])
        return here.gather(1, index.clamp(0, here.shape[1] - 1)).masked_fill(~known, -1)

    def _reduce(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Returns attention ``[B, L]`` and entropy ``[B]`` of rows ``[B, H, n]``, on the CPU."""
        entropy = -torch.xlogy(rows, rows).sum(-1).mean(1)
        return self._spread(rows.mean(1).to(columns.device), columns).cpu(), entropy.cpu()

    def _spread(self, x: Tensor, columns: Tensor, into: Tensor | None = None) -> Tensor:
        """Returns ``x`` ``[B, m]`` at its columns, ``[B, L]``, and what ``into`` has elsewhere."""
        full = x.new_zeros(self.valid.shape) if into is None else into
        spare = torch.cat([full, full[:, :1]], dim=1)  # for what has no column
        return spare.scatter(1, columns.masked_fill(columns < 0, full.shape[1]), x)[:, :-1]


def last_rows(q: Tensor, k: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """Returns the attention of the last query, ``[B, H, n]`` float32.

    Args:
        q: ``[B, H, m, d]``; k: ``[B, Hkv, n, d]``, the H heads in groups.
        mask: as attention gets it: bool or additive ``[., ., m, keys]``, ``[B, keys]``, or None.
    """
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    with full_precision(q):
        queries = q[:, :, -1].float().unflatten(1, (k.shape[1], -1))  # [B, Hkv, G, d]
        logits = ((queries * factor) @ k.float().mT).flatten(1, 2)
        if mask is not None:
            last = mask[:, None] if mask.ndim == 2 else mask[:, :, -1]
            last = last[..., : k.shape[2]]
            seen = last.bool() if mask.ndim == 2 or last.dtype == torch.bool else last >= 0
            logits = logits.masked_fill(~seen, -torch.inf)
        return logits.softmax(-1)
