"""What leaves the cache of a layer once the prompt is in it, head by head.

A strategy gives what decides as ``Stage.evict``. All tokens take part while the prompt is read;
tokens decoded later find fewer entries of visual ones.

H query heads, Hkv key/value heads, n tokens of one prompt, N of them visual, d width of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from vtprune.budget import Budget


@dataclass(frozen=True)
class Entries:
    """One prompt in one layer when it was read: what it asked, and what is in the cache.

    Attributes:
        q: ``[H, n, d]``; k, v: ``[Hkv, n, d]``. As attention used them, without padding.
        visual: ``[n]`` bool.
        scale: factor of the products; None = ``d ** -0.5``.
        sees: returns what some tokens ``[M]`` see, ``[M, n]`` bool; None = each itself and those
            before it.
        where: ``[n, 4]`` image, tile or frame, row and column of each token, -1 of what is made of
            no patch; None = visual tokens form no grid.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    visual: Tensor
    scale: float | None = None
    sees: Callable[[Tensor], Tensor] | None = None
    where: Tensor | None = None

    @property
    def n(self) -> int:
        return self.k.shape[1]

    def seen(self, rows: Tensor) -> Tensor:
        """Returns what the tokens ``rows`` ``[M]`` see, ``[M, n]`` bool."""
        if self.sees is not None:
            return self.sees(rows)
        return torch.arange(self.n, device=rows.device) <= rows[:, None]


@dataclass(frozen=True)
class Kept:
    """What is left in the cache.

    Attributes:
        stays: ``[Hkv, n]`` bool, equally many in each head.
        k, v: ``[Hkv, n, d]`` to be held from now on; of what leaves they mean nothing. None = those
            that were there.
    """

    stays: Tensor
    k: Tensor | None = None
    v: Tensor | None = None


class Evictor(Protocol):
    """What decides which entries of a prompt a layer's cache holds."""

    def evict(self, entries: Entries, budget: Budget) -> Kept | None:
        """Returns what is left by a budget of visual tokens per head; None = all, as it is."""
        ...
