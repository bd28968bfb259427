"""Entries of visual tokens leave a layer's cache, head by head, once the prompt is in it.

The prompt is read as ever: queries, keys and values are only looked at. While tokens are decoded
each head finds what it kept; masks and positions follow as for any cache that holds less.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vtprune.engine.choosing import hold
from vtprune.engine.computing import part_of
from vtprune.engine.cuts import Cut
from vtprune.engine.decoding import Decoding
from vtprune.engine.report import StageReport
from vtprune.engine.signals import Step
from vtprune.engine.tap import Changer, _refuse_changed, is_reading
from vtprune.engine.timing import part
from vtprune.errors import HookError, InputError, UnsupportedError
from vtprune.evicting import Entries, Kept

Parts = tuple[Tensor, Tensor, Tensor]  # queries, keys and values of a layer


@dataclass
class Leaving:
    """What a layer's cache is to become: ``stays`` ``[B, Hkv, n]`` bool, ``made`` where merged.

    That has ``keys`` or ``values`` ``[B, Hkv, n, d]`` in place of those that attention used.
    """

    stays: Tensor
    made: dict[str, Tensor] = field(default_factory=dict)
    changed: bool = False

    def write(self, rows: slice, spots: Tensor, kept: Kept, k: Tensor, v: Tensor) -> None:
        """Takes what is kept of the tokens ``spots`` ``[n]`` of some rows of ``k`` and ``v``."""
        self.stays[rows, :, spots], self.changed = kept.stays, True
        for name, own, used in (("keys", kept.k, k), ("values", kept.v, v)):
            if own is not None:
                if name not in self.made:
                    self.made[name] = used.clone()
                self.made[name][rows, :, spots] = own


class Evicting:
    """The stages of one handle that shorten caches.

    Args:
        layers: decoder layers in order; ``steps`` those inside the language model.
        current: returns the running call's ``Decoding``, or None to leave a call alone.
        inner: what stands between the attention calls beside it, and acts as ever.
    """

    def __init__(
        self,
        layers: Sequence[Any],
        steps: Sequence[Step],
        current: Callable[[], Decoding | None],
        inner: Changer,
    ) -> None:
        self.steps = {step.stage.layer or 0: step for step in steps if step.stage.evict}
        self.modules = {n: part_of(layers[n], "self_attn") for n in sorted(self.steps)}
        self.numbers = {module: number for number, module in self.modules.items()}
        self.current, self.inner = current, inner

    def install(self, undo: ExitStack) -> None:
        """Registers the hooks; ``undo`` takes them off."""
        for number, module in self.modules.items():
            hook = module.register_forward_hook(self._settle(number), with_kwargs=True)
            undo.callback(hook.remove)

    def attend(
        self,
        forward: Callable[..., Any],
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Returns what attention gives, and notes what is to leave the cache after it."""
        number, decoding = self.numbers.get(module), self.current()
        if number is not None and decoding is not None and not _passed(decoding):
            _refuse_changed(module, kwargs)
            self._note(number, decoding, (query, key, value), mask, kwargs.get("scaling"))
        return self.inner.attend(forward, module, query, key, value, mask, *args, **kwargs)

    @torch.no_grad()
    def _note(self, number: int, decoding: Decoding, qkv: Parts, *more: Any) -> None:
        q, k, v = qkv
        if k.shape[2] != q.shape[2]:
            raise UnsupportedError(
                f"Layer {number} has {k.shape[2]} keys for {q.shape[2]} queries, but entries are "
                "to leave its cache. Leave cache_implementation out."
            )
        columns = decoding.cut(number) or Cut.whole(decoding.valid)
        leaving = Leaving(columns.valid.to(q.device)[:, None].repeat(1, k.shape[1], 1))
        with part("score"):
            for b, spots, entries in _prompts(decoding, columns.to(q.device), qkv, *more):
                kept = self._decide(number, decoding, entries, b // decoding.copies)
                if kept is not None:
                    leaving.write(slice(b, b + decoding.copies), spots, kept, k, v)
        decoding.leaving[number] = leaving

    def _decide(self, number: int, decoding: Decoding, entries: Entries, row: int) -> Kept | None:
        """Asks the strategy about one prompt; its copies follow."""
        step, tokens = self.steps[number], int(entries.visual.sum())
        if not tokens or step.stage.evict is None:
            return None
        kept = step.stage.evict.evict(entries, step.budget)
        left = tokens if kept is None else _count(kept, entries, step)
        merged = kept is not None and not (kept.k is None and kept.v is None)
        decoding.caches.append(StageReport(number, row, tokens, left, merged))
        return kept

    def _settle(self, number: int) -> Callable[..., None]:
        """Returns a hook that lets entries leave the cache."""

        def after(module: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
            decoding, cache = self.current(), kwargs.get("past_key_values")
            if decoding is None or _passed(decoding):
                return
            leaving = decoding.leaving.pop(number, None)
            if leaving is None:
                raise HookError(
                    f"{type(module).__name__} did not call the attention interface. Use a language "
                    "model whose attention is sdpa or eager."
                )
            if cache is None or not leaving.changed:
                return
            for name, made in leaving.made.items():
                setattr(cache.layers[number], name, made)
            hold(cache, number, decoding, leaving.stays.to(decoding.valid.device))

        return after


def _passed(decoding: Decoding) -> bool:
    """Returns whether the prompt was read, or is read by the way."""
    return decoding.prefilled or is_reading()


def _prompts(
    decoding: Decoding, columns: Cut, qkv: Parts, mask: Tensor | None, scale: float | None
) -> Iterator[tuple[int, Tensor, Entries]]:
    """Yields of each prompt the first of its rows, where its tokens are in it, and its entries."""
    visual = columns.of(decoding.visual.to(columns.index.device))
    where = _where(decoding)
    for b in range(0, len(visual), decoding.copies):
        spots = columns.valid[b].nonzero()[:, 0]
        places = None
        if where is not None:
            places = where[b // decoding.copies].to(spots.device)[columns.index[b, spots]]
        sees = _sees(mask, b, spots)
        q, k, v = (x[b][:, spots] for x in qkv)
        yield b, spots, Entries(q, k, v, visual[b, spots], scale, sees, places)


def _where(decoding: Decoding) -> Tensor | None:
    """Returns where the prompts' tokens are, ``[B, L, 4]``; None where they form no grid."""
    with suppress(UnsupportedError):
        return None if decoding.where is None else decoding.where()
    return None


def _sees(mask: Tensor | None, b: int, spots: Tensor) -> Callable[[Tensor], Tensor] | None:
    """Returns what tells which of ``spots`` ``[n]`` some of them see; None = those before.

    Without a mask, or with one of padding alone, attention is causal.
    """
    if mask is None or mask.ndim == 2:
        return None
    return partial(_rows_of, mask[b if len(mask) > 1 else 0, 0], spots)


def _rows_of(mask: Tensor, spots: Tensor, rows: Tensor) -> Tensor:
    seen = mask[spots[rows]][:, spots]
    return seen if seen.dtype == torch.bool else seen >= 0


def _count(kept: Kept, entries: Entries, step: Step) -> int:
    """Returns how many visual tokens each head keeps.

    Raises:
        InputError: heads keep unequal numbers.
    """
    counts = kept.stays.sum(1)
    if kept.stays.shape != entries.k.shape[:2] or not bool((counts == counts[0]).all()):
        raise InputError(
            f"{step.strategy.name} keeps {counts.tolist()} of {entries.n} tokens, head by head; of "
            f"each of {len(entries.k)} heads equally many can be held."
        )
    return int((kept.stays & entries.visual).sum(1)[0])
