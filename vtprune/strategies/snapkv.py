"""SnapKV: after the prefill each head caches the visual tokens that the question attends to.

All tokens take part while the prompt is read; then in each layer every key/value head drops visual
tokens of its own choice, so decoding reads and stores less while the prefill costs the same. The
choice is by the mean attention of an observation window, averaged over neighbours and over the
query heads that share the key/value head. arXiv 2404.14469 (FasterDecoding/SnapKV). It is
query-aware: what one question left is not what the next one in the same cache would need. What
differs from the official code, which is of text: the window is the question instead of the last 32
tokens; text always stays, and only visual tokens are counted; neighbours are those in the image
instead of in the row of tokens; the mean at a border is over the neighbours that there are; and the
values of tokens that leave are merged into those that stay, as kvpress does. Defaults: ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vtprune.errors import ConfigError
from vtprune.evicting import Entries, Kept
from vtprune.scoring.evicting import (
    Merge,
    check_merge,
    keep_visual,
    pooled,
    question,
    window_attention,
)
from vtprune.strategies._cache import Cached
from vtprune.types import Budget


@dataclass(frozen=True)
class SnapKV(Cached):
    """``window``: how many of the last tokens observe; None = those after the last visual one.

    ``side``: of the square of neighbours in an image, ``run``: tokens in order that count as such
    where they form no grid; both odd, 1 = no neighbours. ``merge``: what of tokens that leave is
    merged into those that stay: the ``values``, keys and values too (``pivot``, ``average`` or
    ``weighted``, as in ``lookm``), or ``none``.
    """

    window: int | None = None
    side: int = 3
    run: int = 5
    merge: Merge = "values"

    def __post_init__(self) -> None:
        check_merge(self.merge)
        if self.window is not None and (type(self.window) is not int or self.window < 1):
            raise ConfigError(f"window={self.window!r} is no number of tokens; give 1 or more.")
        for name, width in {"side": self.side, "run": self.run}.items():
            if type(width) is not int or width < 1 or width % 2 == 0:
                raise ConfigError(f"{name}={width!r} has no middle; give an odd number from 1.")

    def evict(self, entries: Entries, budget: Budget) -> Kept | None:
        n_visual = int(entries.visual.sum())
        if (k := budget.count(n_visual)) >= n_visual:
            return None
        rows = question(entries.visual)
        if self.window is not None:
            rows = torch.arange(entries.n, device=rows.device)[-self.window :]
        where = None if entries.where is None else entries.where[entries.visual]
        scores = window_attention(entries, rows)[:, entries.visual]
        return keep_visual(entries, pooled(scores, where, self.side, self.run), k, self.merge)
