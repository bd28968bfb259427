"""ZipVL: in each layer attend, and cache, only as many tokens as hold most of the attention.

Probes, the last 64 tokens of the prompt and 64 by chance, tell in each layer of the language model
how many tokens hold the share ``tau`` of their attention; as many have the highest attention per
probe that sees them. Only those attend and see each other. The others keep their place and pass
the MLP, so another layer may choose them; from that layer's cache they drop (the paper's second
version) or are packed into fewer bits than the chosen ones (its first), which saves memory and no
time. After every 100 decoded tokens the same is done with these, by the attention of the last one.
arXiv 2410.08584; there is no official code. What differs: text of the prompt always counts as
chosen, while decoded text drops or packs as in the paper. Ours are the ranges of packed numbers:
of a key's channel over 32 tokens, of a token's value over 32 channels. What the probes cost is in
no count of operations. Defaults: the paper.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vtprune.errors import ConfigError
from vtprune.rules import Others
from vtprune.scoring.probing import accumulated, important, needed, per_viewer, probes
from vtprune.strategies._compute import Compute
from vtprune.types import Facts, RowRule


@dataclass(frozen=True)
class ZipVL(Compute):
    """``tau``, above 0 and up to 1: the share of attention; 0.96 is the authors' lower one.

    ``others`` says what becomes in the cache of tokens that are not chosen: they ``drop``, ``pack``
    or ``keep``. With ``pack``, ``bits`` are those of chosen tokens and of the others: 1, 2, 4 or 8.
    After ``every`` so many tokens behind the prompt it is chosen among them; None = never.
    """

    tau: float = 0.975
    others: Others = "drop"
    bits: tuple[int, int] = (4, 2)
    every: int | None = 100

    def __post_init__(self) -> None:
        if not 0 < self.tau <= 1:
            raise ConfigError(
                f"tau={self.tau!r} is no share of attention; give one above 0 and up to 1."
            )
        self._rule()

    def rule(self, layer: int, facts: Facts) -> RowRule:
        return self._rule()

    def _rule(self) -> RowRule:
        return RowRule("chosen", chooser=self, others=self.others, bits=self.bits, every=self.every)

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
        counts = needed(mass, self.tau, len(seen))
        return _best(per_viewer(mass, seen), counts)

    def choose_again(self, q: Tensor, k: Tensor, scale: float | None, new: int) -> Tensor:
        """Returns which of the last ``new`` tokens hold ``tau`` of what the last one gives them."""
        seen = torch.ones(1, k.shape[2], dtype=torch.bool, device=k.device)
        mass = accumulated(q, k, seen, scale)[:, -new:]
        return _best(mass, needed(mass, self.tau, float(mass.double().sum())))


def _best(scores: Tensor, counts: Tensor) -> Tensor:
    """Returns which are best, ``[n]`` bool, and the last one."""
    last = torch.zeros_like(scores, dtype=torch.bool)
    last[:, -1] = True
    return important(scores, counts, last)[0]
