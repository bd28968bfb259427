"""How many tokens blocks leave by published lists, on towers of any depth and number of tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from vtprune.errors import ConfigError


@dataclass(frozen=True)
class Rates:
    """Per block how many of ``tokens`` pruning leaves, then merging, [CLS] among all of them.

    A depth is a share of the blocks, from 0 before the first to 1 after the last; between two
    blocks everything runs evenly.

    Raises:
        ConfigError: lists of unequal length, or counts that do not fall from ``tokens`` to 2.
    """

    prune: tuple[int, ...]
    merge: tuple[int, ...]
    tokens: int = 197

    def __post_init__(self) -> None:
        even = len(self.prune) == len(self.merge) > 0
        steps = [n for both in zip(self.prune, self.merge, strict=False) for n in both]
        whole = all(isinstance(n, int) and not isinstance(n, bool) for n in (*steps, self.tokens))
        if not even or not whole or any(a < b for a, b in pairwise((self.tokens, *steps, 2))):
            raise ConfigError(
                f"rates={(self.prune, self.merge)} of tokens={self.tokens}: give two lists of one "
                "length, of what pruning and then merging leaves in each block, that never rise "
                "from one to the other and end at 2 or above, [CLS] counted."
            )

    def left(self, depth: float) -> float:
        """Returns which share of the patches is left there."""
        return _between([1.0, *((n - 1) / (self.tokens - 1) for n in self.merge)], depth)

    def pruned(self, first: float, last: float) -> float:
        """Returns which share of what leaves between two depths is pruned; the rest merges."""
        gone, before = [0.0], (self.tokens, *self.merge)
        for entered, left in zip(before, self.prune, strict=False):
            gone.append(gone[-1] + (entered - left) / (self.tokens - 1))
        leaving = self.left(first) - self.left(last)
        return (_between(gone, last) - _between(gone, first)) / leaving if leaving > 0 else 0.0

    def power(self, keep: float) -> float:
        """Returns the power of all shares by which the last block but one leaves ``keep``.

        At most 1: what is still too much then leaves in the last block, as in the published lists,
        which drop there what only the head would read.
        """
        last = (self.merge[-2] - 1) / (self.tokens - 1) if len(self.merge) > 1 else 1.0
        return min(1.0, math.log(keep) / math.log(last)) if last < 1 else 1.0

    def count(self, n: int, k: int, depth: float) -> int:
        """Returns how many of ``n`` patches are left there, if ``k`` are in the end."""
        return k if depth >= 1 else max(k, round(n * self.left(depth) ** self.power(k / n)))


def thinned(n: int, k: int, stages: int, new: int) -> list[int]:
    """Returns how many of ``n`` tokens each stage leaves if all keep one share, and the last ``k``.

    The share is the smallest that leaves enough: ``ceil(share * n)`` tokens, and ``new`` ones.

    Args:
        k: from 1 to n; stages: at least 1.
    """

    def left(share: float) -> list[int]:
        counts = [n]
        for _ in range(stages):
            counts.append(min(counts[-1], math.ceil(share * counts[-1]) + new))
        return counts[1:]

    low, high = 0.0, 1.0
    for _ in range(40):
        share = (low + high) / 2
        low, high = (low, share) if left(share)[-1] >= k else (share, high)
    return [*(max(k, count) for count in left(high)[:-1]), k]


def _between(values: Sequence[float], depth: float) -> float:
    """Returns the value at a depth, the first being at 0 and the last at 1."""
    at = depth * (len(values) - 1)
    low = min(int(at), len(values) - 2)
    return values[low] + (values[low + 1] - values[low]) * (at - low)


_LISTS = {
    "deit_s_2.3": (
        (197, 192, 168, 143, 121, 105, 92, 74, 62, 45, 33, 3),
        (197, 180, 156, 127, 109, 98, 80, 66, 52, 37, 31, 3),
    ),
    "deit_s_2.9": (
        (197, 196, 190, 168, 150, 139, 129, 117, 99, 78, 58, 3),
        (197, 194, 176, 156, 141, 133, 121, 107, 88, 64, 56, 3),
    ),
    "deit_b_8.7": (
        (197, 192, 172, 156, 131, 107, 90, 72, 56, 33, 17, 3),
        (197, 178, 162, 141, 115, 96, 78, 60, 47, 21, 13, 3),
    ),
    "deit_b_11.5": (
        (197, 197, 197, 188, 170, 154, 139, 123, 107, 72, 43, 3),
        (197, 197, 192, 178, 158, 145, 127, 111, 94, 50, 35, 3),
    ),
}
# By model and GFLOPs: DiffRate, arXiv 2305.17997 (OpenGVLab/DiffRate).
PUBLISHED = {name: Rates(*lists) for name, lists in _LISTS.items()}
