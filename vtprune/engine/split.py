"""Visual rows of a batch of prompts and all others, and how tensors are divided by them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Split:
    """Which rows that enter a layer are visual; all others pass.

    Attributes:
        visual: ``[B, L]`` bool.
        passing: ``[M]`` int64, the others among all B * L rows; padding is of them.
        index: ``[B, n]`` int64, their columns in each row of the batch, filled up with 0.
        real: ``[M]`` int64, which of the B * n entries of ``index`` are not that filling.
    """

    visual: Tensor
    passing: Tensor
    index: Tensor
    real: Tensor

    @classmethod
    def of(cls, visual: Tensor) -> Split:
        passes, counts = ~visual, (~visual).sum(1)
        n = int(counts.max())
        first = passes.long().argsort(dim=1, descending=True, stable=True)[:, :n]
        there = torch.arange(n, device=visual.device) < counts[:, None]
        real = there.flatten().nonzero()[:, 0]
        return cls(visual, passes.flatten().nonzero()[:, 0], first.masked_fill(~there, 0), real)

    def to(self, device: torch.device) -> Split:
        """Returns the same on ``device``."""
        parts = (self.visual, self.passing, self.index, self.real)
        return self if self.visual.device == device else Split(*(x.to(device) for x in parts))

    def gather(self, x: Tensor) -> Tensor:
        """Returns the rows of ``x`` ``[B, L, ...]`` that pass, ``[1, M, ...]``."""
        return x.flatten(0, 1)[self.passing][None]

    def scatter(self, x: Tensor) -> Tensor:
        """Returns ``x`` ``[1, M, ...]`` in its rows of ``[B, L, ...]``, zeros in the others."""
        out = x.new_zeros(self.visual.numel(), *x.shape[2:])
        out[self.passing] = x[0]
        return out.unflatten(0, self.visual.shape)

    def queries(self, q: Tensor) -> Tensor:
        """Returns the queries ``[B, H, L, d]`` that are left, ``[B, H, n, d]``."""
        return q.gather(2, self.index[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3]))

    def mask(self, mask: Tensor) -> Tensor:
        """Returns these queries' rows of ``mask`` ``[., ., L, keys]``, ``[B, ., n, keys]``."""
        rows = self.index[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3])
        return mask.expand(len(rows), -1, -1, -1).gather(2, rows)

    def answers(self, out: Tensor) -> Tensor:
        """Returns what attention gave ``[B, n, H, d]`` in its rows of ``[B, L, H, d]``."""
        return self.scatter(out.flatten(0, 1)[self.real][None])
