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
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vtprune.errors import HookError
from vtprune.kernels.attn_received import attn_received
from vtprune.kernels.attn_rows import attn_rows
from vtprune.types import ClsRow, Keys, Received, TowerNeed

_reading: ContextVar[Tap | Rows | None] = ContextVar("vtprune_tap", default=None)
_users: Counter[str] = Counter()
_previous: dict[str, Callable[..., Any] | None] = {}


class Tap:
    """What to read in which attention module, and what was read.

    Args:
        wanted: needs per module.
        n_prefix: tokens before the first patch, dropped from every quantity.
    """

    def __init__(self, wanted: Mapping[nn.Module, Sequence[TowerNeed]], n_prefix: int) -> None:
        self.wanted = wanted
        self.n_prefix = n_prefix
        self._read: dict[TowerNeed, list[Tensor]] = {}

    @torch.no_grad()
    def read(self, module: nn.Module, q: Tensor, k: Tensor, scale: float | None) -> None:
        """Reduces ``q``, ``k`` ``[B, H, S, d]`` to what is wanted of ``module``."""
        for need in self.wanted.get(module, ()):
            self._read.setdefault(need, []).append(self._reduce(need, q, k, scale))

    def _reduce(self, need: TowerNeed, q: Tensor, k: Tensor, scale: float | None) -> Tensor:
        if isinstance(need, ClsRow):
            return attn_rows(q[:, :, :1], k, scale=scale)[:, self.n_prefix :]
        if isinstance(need, Received):
            return attn_received(q, k, scale=scale)[:, self.n_prefix :]
        if isinstance(need, Keys):
            return k.float().mean(1)[:, self.n_prefix :]
        raise HookError(f"The tap cannot read {need}.")

    def values(self) -> dict[TowerNeed, Tensor]:
        """Returns what was read, calls concatenated along the batch.

        Raises:
            HookError: something wanted was never seen.
        """
        for module, needs in self.wanted.items():
            for need in needs:
                if need not in self._read:
                    raise HookError(
                        f"{need} was never read: {type(module).__name__} did not call the "
                        "attention interface. Use a tower whose attention is sdpa or eager."
                    )
        return {need: torch.cat(parts) for need, parts in self._read.items()}


class Rows:
    """Reads the attention of the last token of each row in one module, then stops it.

    Args:
        module: the attention module; it is called inside ``only``.
        valid: ``[B, n]`` bool, which of its columns are tokens.
    """

    class _Enough(Exception):
        pass

    def __init__(self, module: nn.Module, valid: Tensor) -> None:
        self.module, self.valid = module, valid
        self._value: Tensor | None = None

    def read(self, module: nn.Module, q: Tensor, k: Tensor, scale: float | None) -> None:
        """Reduces ``q`` ``[B, H, n, d]`` and ``k`` ``[B, Hkv, n, d]`` to ``[B, n]``, pads 0."""
        if module is not self.module:
            return
        value = torch.zeros(self.valid.shape, device=q.device)
        for b, row in enumerate(self.valid):
            spots = row.nonzero()[:, 0]
            last = q[b : b + 1, :, spots[-1:]]
            value[b, spots] = attn_rows(last, k[b : b + 1, :, spots], scale=scale)[0]
        self._value = value
        raise Rows._Enough

    @contextmanager
    def only(self) -> Iterator[None]:
        """Ends the call of the module once its queries and keys were read."""
        with suppress(Rows._Enough):
            yield

    def value(self) -> Tensor:
        """Returns what was read, ``[B, n]`` float32.

        Raises:
            HookError: the module did not call the attention interface.
        """
        if self._value is None:
            raise HookError(
                f"{type(self.module).__name__} did not call the attention interface. Use a "
                "language model whose attention is sdpa or eager."
            )
        return self._value


@contextmanager
def reading(tap: Tap | Rows) -> Iterator[None]:
    """Lets ``tap`` read the attention calls of this context."""
    token = _reading.set(tap)
    try:
        yield
    finally:
        _reading.reset(token)


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
        tap = _reading.get()
        if tap is not None:
            tap.read(module, query, key, kwargs.get("scaling"))
        forward = original or sys.modules[type(module).__module__].eager_attention_forward
        return forward(module, query, key, value, attention_mask, *args, **kwargs)

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
