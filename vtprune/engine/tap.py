"""The attention tap: reduces queries and keys of chosen modules while the model runs as it is.

A pass-through stands under the same key of transformers' attention registry, so masks, kernels and
configuration stay untouched. It is inert outside a ``reading`` block. An N x N matrix never exists.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vtprune.engine.reduction import reduced
from vtprune.engine.timing import part
from vtprune.errors import HookError, UnsupportedError
from vtprune.kernels.attention_with_lse import attention_with_lse
from vtprune.types import Received, TowerNeed

_reading: ContextVar[Reader | None] = ContextVar("vtprune_tap", default=None)
_changing: ContextVar[Changer | None] = ContextVar("vtprune_changer", default=None)
_users: Counter[str] = Counter()
_previous: dict[str, Callable[..., Any] | None] = {}


class Enough(Exception):
    """Ends the call of a block whose queries and keys are all that is wanted of it."""


class Reader(Protocol):
    """What a ``reading`` block lets look at the attention calls of its context."""

    def reads(self, module: nn.Module) -> bool:
        """Returns whether something is wanted of ``module``."""
        ...

    def read(
        self,
        module: nn.Module,
        q: Tensor,
        k: Tensor,
        mask: Tensor | None,
        scale: float | None,
        v: Tensor | None = None,
    ) -> None:
        """Takes what is wanted of ``module`` from ``q``, ``k``, ``v`` ``[B, H, S, d]``."""
        ...


class Changer(Protocol):
    """What a ``changing`` block lets stand between the attention calls of its context."""

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
        """Returns what ``forward`` would of the rest, changed or not."""
        ...


class Tap:
    """What to read in which attention module, and what was read.

    Args:
        wanted: needs per module.
        n_prefix: tokens before the first patch, dropped from every quantity.
        segments: lengths of the images in a sequence that holds several; attention never crosses
            from one to another. A tower may also call once per image.
    """

    def __init__(
        self,
        wanted: Mapping[nn.Module, Sequence[TowerNeed]],
        n_prefix: int,
        segments: Sequence[int] | None = None,
    ) -> None:
        self.wanted: dict[nn.Module, Sequence[TowerNeed]] = dict(wanted)
        self.n_prefix = n_prefix
        self.segments = list(segments or ())
        self._read: dict[TowerNeed, list[Tensor]] = {}
        self._ahead: nn.Module | None = None

    def reads(self, module: nn.Module) -> bool:
        """Returns whether something is wanted of ``module``."""
        return module in self.wanted

    def follows(self, module: nn.Module, q: Tensor, mask: Tensor | None) -> bool:
        """Returns whether ``module`` is better read once its attention has run."""
        received = any(isinstance(need, Received) for need in self.wanted[module])
        return received and mask is None and module is not self._ahead and not self._packed(q)

    @torch.no_grad()
    def read(
        self,
        module: nn.Module,
        q: Tensor,
        k: Tensor,
        mask: Tensor | None,
        scale: float | None,
        v: Tensor | None = None,
        lse: Tensor | None = None,
    ) -> None:
        """Reduces ``q``, ``k``, ``v`` ``[B, H, S, d]`` to what is wanted of ``module``.

        Args:
            lse: ``[B, H, S]`` log-sum-exp of its attention, where that is known.
        """
        added = None if len(self.segments) > 1 else _added(mask)
        for queries, keys, values in self._parts(q, k, k if v is None else v, mask):
            for need in self.wanted[module]:
                value = self._reduce(need, queries, keys, values, scale, added, lse)
                self._read.setdefault(need, []).append(value.flatten(0, 1))
        if module is self._ahead:
            raise Enough

    @contextmanager
    def ahead(self, module: nn.Module) -> Iterator[None]:
        """Reads ``module`` inside, where its call ends with that, and not when its turn comes."""
        self._ahead = module
        with suppress(Enough):
            yield
        self._ahead = None
        self.wanted.pop(module, None)

    def _parts(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Queries, keys and values of what attends to itself alone."""
        if self._packed(q):
            pieces = (x.split(self.segments, dim=2) for x in (q, k, v))
            return list(zip(*pieces, strict=True))
        if mask is not None and not self.segments and bool(_hidden(mask).any()):
            raise UnsupportedError(
                "The vision tower hides padding inside an image from its attention, which the tap "
                "does not follow. Give images that fill their tiles, or use a strategy that reads "
                "no attention, such as 'divprune'."
            )
        return [(q, k, v)]

    def _packed(self, q: Tensor) -> bool:
        return len(self.segments) > 1 and q.shape[2] == sum(self.segments)

    def _reduce(self, need: TowerNeed, q: Tensor, k: Tensor, v: Tensor, *more: Any) -> Tensor:
        return reduced(need, q, k, v, self.n_prefix, *more)

    def value(self, need: TowerNeed) -> Tensor:
        """Returns what was read, ``[P, ...]`` over all patches in the order of the tower.

        Raises:
            HookError: it was never seen.
        """
        if need not in self._read:
            raise HookError(
                f"{need} was never read: its block did not call the attention interface. Use a "
                "tower whose attention is sdpa or eager."
            )
        return torch.cat(self._read[need])

    def take(self, need: TowerNeed) -> Tensor:
        """Returns ``value(need)`` and forgets it."""
        value = self.value(need)
        del self._read[need]
        return value

    def put(self, need: TowerNeed, value: Tensor) -> None:
        """Makes ``value`` ``[P, ...]`` what was read."""
        self._read[need] = [value]


def _added(mask: Tensor | None) -> Tensor | None:
    """Returns the mask if it adds the same to the products of all queries with a key."""
    if mask is None or mask.ndim != 4 or mask.shape[2] > 1 or not mask.is_floating_point():
        return None
    return mask


def _hidden(mask: Tensor) -> Tensor:
    return ~mask.bool() if mask.dtype == torch.bool or mask.ndim == 2 else mask < 0


@contextmanager
def reading(tap: Reader) -> Iterator[None]:
    """Lets ``tap`` read the attention calls of this context."""
    token = _reading.set(tap)
    try:
        yield
    finally:
        _reading.reset(token)


def is_reading() -> bool:
    """Returns whether calls of this context are made to be read; an onlooker's are the model's."""
    found = _reading.get()
    return found is not None and not getattr(found, "looks_on", False)


def reader() -> Reader | None:
    """Returns what reads in this context, for attention that does not pass transformers'."""
    return _reading.get()


@contextmanager
def changing(changer: Changer) -> Iterator[None]:
    """Lets ``changer`` stand between the attention calls of this context."""
    token = _changing.set(changer)
    try:
        yield
    finally:
        _changing.reset(token)


def _refuse_changed(module: nn.Module, kwargs: Mapping[str, Any]) -> None:
    """Raises UnsupportedError for an attention that is more than a softmax of scaled products."""
    changed = [name for name in ("softcap", "s_aux") if kwargs.get(name) is not None]
    if changed:
        raise UnsupportedError(
            f"{type(module).__name__} changes its attention by {', '.join(changed)}, which cannot "
            "be read or edited. Use a strategy that reads no attention, such as 'divprune'."
        )


def _original(key: str) -> Callable[..., Any] | None:
    """The function under ``key``; None for eager, which transformers looks up per model file."""
    return ALL_ATTENTION_FUNCTIONS.get(key)


def _pass_through(original: Callable[..., Any] | None) -> Callable[..., Any]:
    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        forward = original or sys.modules[type(module).__module__].eager_attention_forward
        changer = _changing.get()
        attention = forward if changer is None else partial(changer.attend, forward)
        call = partial(attention, module, query, key, value, attention_mask, *args, **kwargs)
        tap = _reading.get()
        if tap is None or not tap.reads(module):
            return call()
        _refuse_changed(module, kwargs)
        given = query, key, attention_mask, kwargs.get("scaling"), value
        if changer is None and isinstance(tap, Tap) and tap.follows(module, query, attention_mask):
            out, lse = attention_with_lse(call, query, key)
            with part("score"):
                tap.read(module, *given, lse)
            return out
        with part("score"):
            tap.read(module, *given)
        return call()

    return attend


def install(implementation: str) -> None:
    """Puts the pass-through under the key ``implementation``; counted, undone by ``uninstall``.

    Raises:
        HookError: there is no such attention implementation.
    """
    if not _users[implementation]:
        original = _original(implementation)
        if original is None and implementation != "eager":
            raise HookError(f"Attention implementation {implementation!r} is not registered.")
        _previous[implementation] = ALL_ATTENTION_FUNCTIONS._local_mapping.get(implementation)
        ALL_ATTENTION_FUNCTIONS[implementation] = _pass_through(original)
    _users[implementation] += 1


def uninstall(implementation: str) -> None:
    """Gives back one ``install``; the last one restores what stood there before."""
    _users[implementation] -= 1
    if _users[implementation]:
        return
    previous = _previous.pop(implementation)
    if previous is None:
        del ALL_ATTENTION_FUNCTIONS[implementation]
    else:
        ALL_ATTENTION_FUNCTIONS[implementation] = previous
