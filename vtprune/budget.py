"""How many tokens stay: a count or a share."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from vtprune.errors import ConfigError

Keep = int | float
Scope = Literal["tile", "image", "sample"]


@dataclass(frozen=True)
class Budget:
    """How many tokens stay: a whole number of ``tokens``, or a ``fraction`` of those there are.

    Of several stages with one budget each leaves its ``part``: it says what share of the tokens
    that is, by the share asked for.
    """

    tokens: int | None = None
    fraction: float | None = None
    part: Callable[[float], float] | None = None

    def __post_init__(self) -> None:
        if (self.tokens is None) == (self.fraction is None):
            raise ConfigError("A budget is either tokens or a fraction; give exactly one.")

    @classmethod
    def of(cls, keep: Keep | Budget) -> Budget:
        """Reads ``keep``: an int is a token count, a float in (0, 1] a share.

        Raises:
            ConfigError: a bool, NaN, zero, a negative number, or a share above 1.
        """
        if isinstance(keep, Budget):
            return keep
        allowed = "a token count of at least 1, or a share above 0.0 and up to 1.0"
        if isinstance(keep, bool) or not isinstance(keep, (int, float)):
            raise ConfigError(f"keep={keep!r} is not a budget; give {allowed}.")
        if isinstance(keep, int):
            if keep < 1:
                raise ConfigError(f"keep={keep} keeps nothing; give {allowed}.")
            return cls(tokens=keep)
        if not (math.isfinite(keep) and 0 < keep <= 1):
            raise ConfigError(f"keep={keep} is not a share; give {allowed}.")
        return cls(fraction=keep)

    def count(self, n: int) -> int:
        """Returns the number of tokens kept of ``n``: at least 1 and at most ``n``."""
        wanted = self.share(n) * n if self.tokens is None or self.part else self.tokens
        return max(1, min(round(wanted), n))

    def share(self, n: int) -> float:
        """Returns what share of ``n`` tokens is asked for, up to 1."""
        share = self.fraction if self.tokens is None else self.tokens / max(1, n)
        share = min(1.0, share or 0)
        return share if self.part is None else self.part(share)

    def times(self, n: int | Callable[[float], float]) -> Budget:
        """Returns ``n`` times as much, a share ending at everything; or the part ``n`` of it."""
        if callable(n):
            return replace(self, part=n)
        if self.fraction is not None:
            return Budget(fraction=min(1.0, n * self.fraction))
        return Budget(tokens=n * (self.tokens or 0))

    def split(self, lengths: Sequence[int]) -> list[Budget]:
        """Returns the budgets of parts of ``lengths``, in proportion: the same tokens in all.

        Each part gets at least one token, as the whole does, and none more than it has.
        """
        total = sum(lengths)
        wanted = max(self.count(total), len(lengths))
        exact = [wanted * n / total for n in lengths]
        counts = [max(1, math.floor(x)) for x in exact]
        by_rest = sorted(range(len(lengths)), key=lambda i: math.floor(exact[i]) - exact[i])
        for i in itertools.cycle(by_rest):
            if sum(counts) >= wanted:
                break
            counts[i] += counts[i] < lengths[i]
        return [Budget(tokens=count) for count in counts]

    def check(self, n: int) -> None:
        """Raises ConfigError when more tokens are asked for than the ``n`` there always are."""
        if self.tokens is not None and self.tokens > n:
            raise ConfigError(
                f"keep={self.tokens}, but an image has {n} tokens. Give at most {n}, or a share."
            )
