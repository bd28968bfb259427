"""Readers of one attention module of the language model: what the last token of a row looks at.

The module is called for its queries, keys and values alone; its attention is never computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
from torch import Tensor, nn

from vtprune.engine.tap import Enough, passing
from vtprune.errors import HookError
from vtprune.kernels.attn_rows import attn_rows
from vtprune.types import DecoderNeed, KeyNorm, LastFlow, LastRow


class Rows:
    """Reads the attention of the last token of each row in one module, then stops it.

    Args:
        module: the attention module; it is called inside ``only``.
        valid: ``[B, n]`` bool, which of its columns are tokens.
        visual: ``[B, n]`` bool, which of those are visual ones.
    """

    def __init__(self, module: nn.Module, valid: Tensor, visual: Tensor) -> None:
        self.module, self.valid, self.visual = module, valid, visual
        self._value: Tensor | None = None

    def reads(self, module: nn.Module) -> bool:
        """Returns whether it is this module that is read."""
        return module is self.module

    def read(
        self,
        module: nn.Module,
        q: Tensor,
        k: Tensor,
        mask: Tensor | None,
        scale: float | None,
        v: Tensor | None = None,
    ) -> None:
        """Reduces ``q`` ``[B, H, n, d]``, and ``k``, ``v`` ``[B, Hkv, n, d]``, to ``[B, n]``."""
        self._value = self._reduce(q, k, k if v is None else v, scale)
        raise Enough

    def _reduce(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        value = torch.zeros(self.valid.shape, device=q.device)  # of padding 0
        for b, row in enumerate(self.valid):
            spots = row.nonzero()[:, 0]
            last = q[b : b + 1, :, spots[-1:]]
            value[b, spots] = attn_rows(last, k[b : b + 1, :, spots], scale=scale)[0]
        return value

    @contextmanager
    def only(self) -> Iterator[None]:
        """Ends the call of the module once its queries, keys and values were read."""
        with suppress(Enough):
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


class Flows(Rows):
    """Reads how much of each visual token flows to the last token, then stops the module."""

    def _reduce(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        value = torch.zeros(self.valid.shape, device=q.device)
        for b in self.visual.any(1).nonzero()[:, 0].tolist():
            last, spots = self.valid[b].nonzero()[-1], self.visual[b].nonzero()[:, 0]
            keys, values = (x[b : b + 1, :, spots] for x in (k, v))
            query, anchor = (x[b : b + 1, :, last] for x in (q, v))
            relation = attn_rows(query, keys, scale=scale)
            value[b, spots] = passing(relation, attn_rows(anchor, values), values)[1][0]
        return value


class KeyNorms(Rows):
    """Reads the L1 norm of each token's keys in one module, then stops it."""

    def _reduce(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        return k.float().abs().sum((1, 3))


READERS: dict[type[DecoderNeed], type[Rows]] = {
    LastRow: Rows,
    LastFlow: Flows,
    KeyNorm: KeyNorms,
}
