"""Readers of one attention module of the language model: what some tokens of a row look at.

The module is called for its queries, keys and values alone; its attention is never computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
from torch import Tensor, nn

from vtprune.engine.reduction import passing
from vtprune.engine.tap import Enough
from vtprune.errors import HookError
from vtprune.kernels._common import full_precision
from vtprune.kernels.attn_rows import attn_rows
from vtprune.types import (
    DecoderNeed,
    EachHead,
    EachText,
    KeyNorm,
    LastFlow,
    LastRow,
    LayerKeys,
    TextPeak,
    TextRows,
    VisualRows,
)

AT_ONCE = 256  # queries, so that what each of them sees is never an N x N matrix


class Rows:
    """Reads the attention of the last token of each row in one module, then stops it.

    A subclass reads the mean over the rows of other tokens, which ``asking`` names.

    Args:
        module: the attention module; it is called inside ``only``.
        valid: ``[B, n]`` bool, which of its columns are tokens.
        visual: ``[B, n]`` bool, which of those are visual ones.
    """

    def __init__(self, module: nn.Module, valid: Tensor, visual: Tensor) -> None:
        self.module, self.valid, self.visual = module, valid, visual
        self._value: Tensor | None = None
        self._mask: Tensor | None = None

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
        self._mask = mask
        self._value = self._reduce(q, k, k if v is None else v, scale)
        raise Enough

    def asking(self, b: int) -> Tensor:
        """Returns the columns of row ``b`` whose queries are read, ascending ``[M]``."""
        return self.valid[b].nonzero()[-1:, 0]

    def _reduce(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        value = torch.zeros(self.valid.shape, device=q.device)  # of padding 0
        for b, row in enumerate(self.valid):
            spots, asking = row.nonzero()[:, 0], self.asking(b)
            keys = k[b : b + 1, :, spots]
            for some in asking.split(AT_ONCE) if len(asking) else ():
                seen, queries = self._seen(b, some, spots), q[b : b + 1, :, some]
                part = attn_rows(queries, keys, scale=scale, seen=seen)[0]
                value[b, spots] += part * (len(some) / len(asking))
        return value

    def _seen(self, b: int, asking: Tensor, spots: Tensor) -> Tensor:
        """Returns which of ``spots`` the module lets each query see, ``[M, N]`` bool.

        Without a mask, or with one of padding alone, it is causal.
        """
        mask = self._mask
        if mask is None or mask.ndim == 2:
            return spots <= asking[:, None]
        rows = mask[b if len(mask) > 1 else 0, 0, asking][:, spots]
        return rows if rows.dtype == torch.bool else rows >= 0

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


class Texts(Rows):
    """Reads the mean attention of what comes after the last visual token, or of the last token."""

    def asking(self, b: int) -> Tensor:
        last = self.visual[b].nonzero()[-1:, 0]
        spots = self.valid[b].nonzero()[:, 0]
        after = spots[spots > last] if len(last) else spots[:0]
        return after if len(after) else spots[-1:]


class Visuals(Rows):
    """Reads the mean attention of all visual tokens."""

    def asking(self, b: int) -> Tensor:
        return self.visual[b].nonzero()[:, 0]


class EachTexts(Texts):
    """Reads the attention of each of those tokens by itself, mean over heads."""

    def _reduce(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        asking = [self.asking(b) for b in range(len(q))]
        most = max(map(len, asking))
        value = [q.new_zeros(0)] * len(q)
        for b, rows in enumerate(asking):
            spots = self.valid[b].nonzero()[:, 0]
            parts = [
                self._of(q[b, :, some], k[b, :, spots], self._seen(b, some, spots), scale)
                for some in rows.split(AT_ONCE)
            ]
            read = torch.cat(parts, dim=1)  # [N, M, ...]
            value[b] = read.new_zeros(self.valid.shape[1], most, *read.shape[2:])
            value[b][spots, : len(rows)] = read
        return torch.stack(value)

    def _of(self, q: Tensor, k: Tensor, seen: Tensor, scale: float | None) -> Tensor:
        return _heads(q, k, seen, scale).mean(-1)


class EachHeads(EachTexts):
    """Reads the attention of each of those tokens by itself, head by head."""

    def _of(self, q: Tensor, k: Tensor, seen: Tensor, scale: float | None) -> Tensor:
        return _heads(q, k, seen, scale)


class Peaks(Texts):
    """Reads the most that any of those tokens attends with any head."""

    def _reduce(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        value = torch.zeros(self.valid.shape, device=q.device)
        for b, row in enumerate(self.valid):
            spots = row.nonzero()[:, 0]
            for some in self.asking(b).split(AT_ONCE):
                read = _heads(q[b, :, some], k[b, :, spots], self._seen(b, some, spots), scale)
                value[b, spots] = value[b, spots].maximum(read.amax((1, 2)))
        return value


def _heads(q: Tensor, k: Tensor, seen: Tensor, scale: float | None) -> Tensor:
    """Returns attention ``[N, M, H]`` of queries ``[H, M, d]`` to keys ``[Hkv, N, d]``."""
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    with full_precision(q):
        keys = k.float().repeat_interleave(len(q) // len(k), dim=0)
        logits = (q.float() * factor) @ keys.mT
        return logits.masked_fill(~seen, -torch.inf).softmax(-1).permute(2, 1, 0)


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


class MeanKeys(Rows):
    """Reads the mean over heads of each token's keys in one module, then stops it."""

    def _reduce(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        return k.float().mean(1)


READERS: dict[type[DecoderNeed], type[Rows]] = {
    LastRow: Rows,
    TextRows: Texts,
    TextPeak: Peaks,
    VisualRows: Visuals,
    EachText: EachTexts,
    EachHead: EachHeads,
    LastFlow: Flows,
    KeyNorm: KeyNorms,
    LayerKeys: MeanKeys,
}
