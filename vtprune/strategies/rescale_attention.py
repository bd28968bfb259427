"""RescaleAttention: multiply the attention to some kind of keys, in the heads and layers you name.

What it does to a row is the operation of ZeroTuning (arXiv 2505.11739: the first token by a factor
per head, the row made to sum to 1 again) and of ACT (arXiv 2406.15765: other sinks by a factor,
what they lose handed to the others), whose factors and heads are found on data of one's own.
Nothing is saved: rows that it edits are computed again. ZeroTuning is ``keys="first"``; ACT is
``keys="sinks", into="others", queries="all", decoded=False``, its sinks here told by hidden states
and not by the attention that they got. Defaults: ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from vtprune.errors import ConfigError
from vtprune.interventions import Entering, Keys, Queries
from vtprune.scoring.sinks import rescale_attention
from vtprune.strategies._compute import Compute
from vtprune.strategies._sinks import Dims, check_sinks, dims_for, marked
from vtprune.types import Budget, Facts, Intervention

Kind = Literal["visual", "text", "first", "sinks"]


@dataclass(frozen=True)
class RescaleAttention(Compute):
    """``factor``, at least 0, multiplies attention to ``keys``; one for each of ``heads``, or one.

    ``keys``: ``visual`` ones, those of ``text`` (all others), the prompt's ``first``, or ``sinks``
    besides the first. ``into``: which keys get what those lose, one of these kinds or the
    ``others``; None = all, so that the row just sums to 1, and only so may a factor exceed 1.
    ``queries``: rows of the ``text`` after the image, of the ``last`` token, of ``visual`` ones, or
    ``all``. ``decoded``: whether of decoded tokens too. ``heads``: 0-based query heads; None = all.
    ``dims`` and ``tau`` tell sinks, as in ``var``.
    """

    factor: float | tuple[float, ...] = 1.5
    keys: Kind = "visual"
    into: Kind | Literal["others"] | None = None
    queries: Queries = "text"
    decoded: bool = True
    heads: tuple[int, ...] | None = None
    dims: Dims = None
    tau: float | None = None

    def __post_init__(self) -> None:
        for name in ("factor", "heads"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        factors = self.factor if isinstance(self.factor, tuple) else (self.factor,)
        numeric = all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in factors)
        if not (factors and numeric and all(math.isfinite(x) and x >= 0 for x in factors)):
            raise ConfigError(f"factor={self.factor!r} must be a number of at least 0, or several.")
        if self.into is not None and max(factors) > 1:
            raise ConfigError(
                f"factor={self.factor} above 1 with into={self.into!r}: nothing is lost that these "
                "could get. Leave into out; the row then sums to 1 again."
            )
        if isinstance(self.factor, tuple) and len(factors) != len(self.heads or ()):
            raise ConfigError(
                f"factor={self.factor} are {len(factors)} for heads={self.heads}; give one for "
                "each head, or one number for all."
            )
        for name, allowed in (
            ("keys", get_args(Kind)),
            ("into", (*get_args(Kind), "others", None)),
        ):
            if getattr(self, name) not in allowed:
                known = ", ".join(map(repr, allowed))
                raise ConfigError(
                    f"{name}={getattr(self, name)!r} is unknown; choose one of {known}."
                )
        check_sinks(self)
        self._intervention()

    def check_budget(self, budget: Budget, facts: Facts) -> None:
        dims_for(self.dims, facts)

    def rule(self, layer: int, facts: Facts) -> Intervention:
        return replace(self, dims=dims_for(self.dims, facts))._intervention()

    def _intervention(self) -> Intervention:
        return Intervention(self, self.queries, self.decoded, heads=self.heads)

    def mark(self, entering: Entering) -> tuple[Tensor, ...]:
        if "sinks" not in (self.keys, self.into):
            return ()
        return (marked(entering, self.dims, self.tau) & ~entering.first,)

    def edit(self, rows: Tensor, keys: Keys) -> Tensor:
        kinds = {"visual": keys.visual, "text": ~keys.visual, "first": keys.first}
        if keys.marks:
            kinds["sinks"] = keys.marks[0]
        source = kinds[self.keys]
        kinds["others"] = ~source
        into = None if self.into is None else kinds[self.into]
        factor = torch.tensor(self.factor, device=rows.device)
        factor = factor[:, None, None] if factor.ndim else factor
        return rescale_attention(rows, source, factor, into)
