"""Which tokens stay, and what each output is made of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vtprune.kernels.gather_tokens import gather_tokens
from vtprune.kernels.segment_merge import segment_merge


@dataclass(frozen=True)
class Mix:
    """Sparse weights: edge e adds ``weight[b, e] * x[b, source[b, e]]`` to output ``target[b, e]``.

    ``source``, ``target``: ``[B, E]`` int64; ``weight``: ``[B, E]`` float32. Sources from N on are
    the tower's prefix tokens (CLS first).
    """

    source: Tensor
    target: Tensor
    weight: Tensor


@dataclass(frozen=True)
class Selection:
    """Which of N tokens stay, and what each output is made of.

    Attributes:
        rows: ``[B, K]`` int64, source position whose slot and position id each output takes;
            -1 = a new row, which takes the first free slot.
        n: number of source tokens.
        mix: what each output is made of; None = a copy of its source.
        sizes: ``[B, K]`` float32, how many patches each output counts for where that is not the
            sum over what it is made of; 0 = it fills a row up and is seen by no token.
    """

    rows: Tensor
    n: int
    mix: Mix | None = None
    sizes: Tensor | None = None

    @classmethod
    def all(cls, batch: int, n: int, device: torch.device) -> Selection:
        """Keeps everything."""
        return cls(torch.arange(n, device=device).expand(batch, n), n)

    @property
    def is_identity(self) -> bool:
        """Whether everything stays as it is (strategies are not asked when all tokens stay)."""
        return self.mix is None and self.rows.shape[1] == self.n

    @property
    def n_prefix(self) -> int:
        """Tokens of the tower's prefix, such as [CLS], up to the last that the mix reads."""
        if self.mix is None or not self.mix.source.numel():
            return 0
        return max(0, int(self.mix.source.max()) + 1 - self.n)

    @property
    def slots(self) -> Tensor:
        """``[B, K]`` int64: ``rows`` with each -1 replaced by the lowest free source position."""
        if self.mix is None:  # only a mix can make new rows
            return self.rows
        new = self.rows < 0
        order = torch.arange(self.n, device=self.rows.device)
        taken = torch.zeros(len(self.rows), self.n + 1, device=self.rows.device, dtype=torch.bool)
        taken.scatter_(1, torch.where(new, self.n, self.rows), True)
        free = torch.where(taken[:, : self.n], self.n, order).sort(dim=1).values
        nth = (new.cumsum(1) - 1).clamp(min=0)
        return torch.where(new, free.gather(1, nth), self.rows)

    def apply(self, x: Tensor) -> Tensor:
        """Returns the outputs ``[B, K, ...]`` made of ``x`` ``[B, N (+ prefix), ...]``."""
        return self.apply_all(x)[0]

    def apply_all(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Returns the outputs made of each of several tensors, as ``apply`` does of one."""
        if self.mix is None:
            return gather_tokens(self.rows, *tensors)
        edges = (self.mix.source, self.mix.target, self.mix.weight)
        return tuple(segment_merge(x, *edges, self.rows.shape[1]) for x in tensors)

    def total(self, x: Tensor) -> Tensor:
        """Returns the sum of ``x`` ``[B, N]`` over what each output is made of, ``[B, K]``."""
        if self.mix is None:
            return x.gather(1, self.rows)
        made = torch.zeros(self.rows.shape, dtype=x.dtype, device=x.device)
        return made.scatter_add_(1, self.mix.target, x.gather(1, self.mix.source))

    def counted(self, sizes: Tensor) -> Tensor:
        """Returns how many patches each output counts for, from ``sizes`` ``[B, N]`` before."""
        return self.total(sizes) if self.sizes is None else self.sizes

    def row(self, b: int) -> Selection:
        """Returns the selection of row ``b`` alone, still with a batch dimension of 1."""
        mix = self.mix
        if mix is not None:
            mix = Mix(mix.source[b : b + 1], mix.target[b : b + 1], mix.weight[b : b + 1])
        sizes = None if self.sizes is None else self.sizes[b : b + 1]
        return Selection(self.rows[b : b + 1], self.n, mix, sizes)
