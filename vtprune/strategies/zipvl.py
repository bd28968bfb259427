"""ZipVL: in each layer attend, and cache, only as many tokens as hold most of the attention.

Probes, the last 64 tokens of the prompt and 64 by chance, tell in each layer of the language model
how many tokens hold the share ``tau`` of their attention; as many have the highest attention per
probe that sees them. Only those attend, see each other and stay in that layer's cache. The others
keep their place and pass the MLP, so another layer may choose them. arXiv 2410.08584, the version
that drops from the cache; there is no official code. What differs: text always stays; the first
layer, by whose cache transformers counts, keeps it whole; decoded tokens are never dropped. What
the probes cost is in no count of operations. Defaults: the paper.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vtprune.errors import ConfigError
from vtprune.scoring.probing import accumulated, important, needed, per_viewer, probes
from vtprune.strategies._compute import Compute
from vtprune.types import Facts, RowRule


@dataclass(frozen=True)
class ZipVL(Compute):
    """``tau``, above 0 and up to 1: the share of attention; 0.96 is the authors' lower one."""

    tau: float = 0.975

    def __post_init__(self) -> None:
        if not 0 < self.tau <= 1:
            raise ConfigError(
                f"tau={self.tau!r} is no share of attention; give one above 0 and up to 1."
            )

    def rule(self, layer: int, facts: Facts) -> RowRule:
        return RowRule(attend="chosen", chooser=self, forget=layer >= facts.first_stage)

    @property
    def share(self) -> float:
        """Of equal shares just so many hold ``tau``, of others fewer."""
        return self.tau

    def asking(self, n: int) -> Tensor:
        """Returns the probes among ``n`` tokens, ``[M]``."""
        return probes(n)

    def choose(self, q: Tensor, k: Tensor, seen: Tensor, scale: float | None) -> Tensor:
        """Returns which tokens of one prompt attend, ``[n]`` bool; the last one does."""
        mass = accumulated(q, k, seen, scale)
        last = torch.zeros_like(mass, dtype=torch.bool)
        last[:, -1] = True
        counts = needed(mass, self.tau, len(seen))
        return important(per_viewer(mass, seen), counts, last)[0]
