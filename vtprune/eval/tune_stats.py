"""What paired right and wrong answers say of a drop in accuracy: an exact upper limit.

The test is the unconditional one for paired shares, ordered by Tango's score statistic (Stat. Med.
1998, 17:891): its error is computed, not approximated, so it holds with any number of samples. The
share of answers gained, on which that error depends, is searched where a confidence interval says
that it may lie (Berger and Boos, JASA 1994, 89:1012).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vtprune.eval._extras import need

SPENT = 0.02  # of the error allowed, on where the share of answers gained may lie
SHARES = 48  # at which the error is computed
BEYOND = 1e-9  # probability of counts that are not looked at; they count as errors
STEPS = 20  # halvings of an interval of shares: to a thousandth of a point of accuracy

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Paired:
    """``n`` samples: ``lost`` are right only unpruned, ``gained`` only with pruning."""

    n: int
    lost: int
    gained: int

    @property
    def drop(self) -> float:
        """The share of right answers that pruning cost."""
        return (self.lost - self.gained) / self.n


def confirms(paired: Paired, bound: float, confidence: float) -> bool:
    """Whether it is shown, with this confidence, that the drop is below ``bound``, -1 to 1.

    If it were ``bound`` or more, this would say yes with a probability of at most 1 - confidence.
    """
    n, allowed = paired.n, 1 - confidence
    if paired.drop >= bound:
        return False
    low, high = _clopper_pearson(paired.gained, n, SPENT * allowed)
    low, high = max(low, -bound, 0.0), min(high, (1 - bound) / 2)
    if low > high:
        return True
    gained = np.linspace(low, high, SHARES)
    return bool(_as_good(paired, bound, gained).max() <= (1 - SPENT) * allowed)


@lru_cache(maxsize=4096)
def upper_limit(paired: Paired, confidence: float) -> float:
    """Returns the smallest drop that these counts still confirm."""
    low, high = paired.drop, 1.0
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if confirms(paired, middle, confidence) else (middle, high)
    return high


@lru_cache(maxsize=256)
def least(bound: float, confidence: float) -> int:
    """Returns how many samples confirm a drop below ``bound`` if no answer changes at all."""
    high = 1
    while not confirms(Paired(high, 0, 0), bound, confidence):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        enough = confirms(Paired(middle, 0, 0), bound, confidence)
        low, high = (low, middle) if enough else (middle, high)
    return high


def needed(paired: Paired, bound: float, confidence: float, power: float = 0.8) -> int | None:
    """Returns about how many samples would do if answers change at the rates seen.

    They confirm the bound with probability ``power``; None = the drop seen is not below it.
    """
    if paired.drop >= bound:
        return None
    lost, gained = paired.lost / paired.n, paired.gained / paired.n
    spread, normal = lost + gained - paired.drop**2, _distributions().norm
    wide = normal.ppf(confidence) * math.sqrt(variance(lost, gained, bound))
    wide += normal.ppf(power) * math.sqrt(spread)
    return max(least(bound, confidence), math.ceil((wide / (bound - paired.drop)) ** 2))


def chance(paired: Paired, bound: float, confidence: float, fresh: int) -> float:
    """Returns about how probable it is that ``fresh`` further samples confirm the bound, 0 to 1.

    By the normal approximation with one sample added to each kind of change, so that to have seen
    none does not mean that there are none.
    """
    n = paired.n + 2
    lost, gained = (paired.lost + 1) / n, (paired.gained + 1) / n
    spread, normal = lost + gained - (lost - gained) ** 2, _distributions().norm
    asked = normal.ppf(confidence) * math.sqrt(variance(lost, gained, bound) / fresh)
    to_spare = bound - (lost - gained) - asked
    return float(normal.cdf(to_spare / math.sqrt(spread / n + spread / fresh)))


def score(lost: Array, gained: Array, n: int, drop: float) -> Array:
    """Returns Tango's statistic: how far counts are from ``drop``, below it negative."""
    spread = n * variance(lost / n, gained / n, drop)
    return (lost - gained - n * drop) / np.sqrt(np.maximum(spread, 1e-12))


def variance(lost: Any, gained: Any, drop: float) -> Any:
    """Returns that of one sample's loss, by shares seen, where the drop is known to be ``drop``."""
    b = (2 - lost + gained) * drop - lost - gained
    likeliest = (np.sqrt(b * b + 8 * gained * drop * (1 - drop)) - b) / 4  # share gained
    return 2 * likeliest + drop * (1 - drop)


def _as_good(paired: Paired, bound: float, shares: Array) -> Array:
    """Returns the probability of counts as good as those seen or better, if the drop is ``bound``.

    Args:
        shares: of answers gained ``[Q]``; the result has one probability for each.
    """
    binomial = _distributions().binom
    n, most = paired.n, int(binomial.ppf(1 - BEYOND, paired.n, shares[-1]))
    gained = np.arange(most + 1)
    seen = score(np.array(float(paired.lost)), np.array(float(paired.gained)), n, bound)
    lost = _most_lost(gained.astype(float), n, bound, float(seen) + 1e-9)
    share = shares[:, None]
    given = binomial.cdf(lost, n - gained, np.minimum((bound + share) / (1 - share), 1.0))
    return (binomial.pmf(gained, n, share) * given).sum(1) + binomial.sf(most, n, shares)


def _most_lost(gained: Array, n: int, bound: float, limit: float) -> Array:
    """Returns per count gained the largest lost whose score is within ``limit``, -1 = none."""
    low, high = np.full_like(gained, -1.0), n - gained + 1
    while (high - low > 1).any():
        middle = np.floor((low + high) / 2)
        within = score(np.maximum(middle, 0), gained, n, bound) <= limit
        low, high = np.where(within, middle, low), np.where(within, high, middle)
    return low


def _clopper_pearson(count: int, n: int, error: float) -> tuple[float, float]:
    beta = _distributions().beta
    low = 0.0 if count == 0 else beta.ppf(error / 2, count, n - count + 1)
    return float(low), 1.0 if count == n else float(beta.isf(error / 2, count + 1, n - count))


def _distributions() -> Any:
    return need("scipy.stats", extra="eval")
