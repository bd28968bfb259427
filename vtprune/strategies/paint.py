"""PAINT: raise the logits of patches that the tower's [CLS] attends to, early and late.

Of each image the patches that [CLS] attends to most in the first block (``top``), and those that
stand out in the block that yields the features (above Q3 + 1.5 IQR), get ``alpha`` and ``beta``
times the size of their logit on top of it, wherever the last token attends, in all heads.
arXiv 2501.12206 (hasanar1f/PAINT). Nothing is saved: a row per layer and token is computed again.
A patch of both sets counts to the second. The modulation by head that the paper speaks of is not in
the official code, and not here; nor is its optional guidance by a prompt without the image.
Defaults: official code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vtprune.errors import ConfigError
from vtprune.interventions import Entering, Keys
from vtprune.kernels.topk_sorted import topk_sorted
from vtprune.strategies._compute import Compute
from vtprune.strategies._sinks import check_share
from vtprune.types import ClsRow, Facts, Intervention


@dataclass(frozen=True)
class PAINT(Compute):
    """``layers`` are by default all from 2 on.

    ``alpha`` and ``beta``, at least 0: by how much of their size logits rise, of patches attended
    to early, and of those that stand out late. ``top``: the share of an image's patches that are of
    the first kind, at least one.
    """

    alpha: float = 0.7
    beta: float = 0.3
    top: float = 0.25

    def __post_init__(self) -> None:
        check_share("top", self.top)
        for name, value in (("alpha", self.alpha), ("beta", self.beta)):
            if isinstance(value, bool) or not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"{name}={value!r} must be a number of at least 0.")

    def default_layers(self, facts: Facts) -> tuple[int, ...]:
        every = range(facts.decoder_layers)
        return tuple(every[2:] or every)

    def rule(self, layer: int, facts: Facts) -> Intervention:
        needs = tuple(dict.fromkeys((ClsRow(0), ClsRow(facts.feature_block))))
        return Intervention(self, queries="last", before_softmax=True, needs=needs)

    def mark(self, entering: Entering) -> tuple[Tensor, ...]:
        """Returns the two sets of patches, decided image by image."""
        every = sorted(entering.values.items(), key=lambda pair: pair[0].layer)
        early, late = every[0][1][..., 0], every[-1][1][..., 0]  # [B, n]
        patches = entering.visual & ~early.isnan()
        first, second = torch.zeros_like(patches), torch.zeros_like(patches)
        for item in entering.item[patches].unique().tolist():
            spots = patches & (entering.item == item)
            second[spots] = _stands_out(late[spots])
            n = max(1, int(self.top * int(spots.sum())))
            best = torch.zeros_like(early[spots], dtype=torch.bool)
            best[topk_sorted(early[spots][None], n)[0]] = True
            first[spots] = best
        return first & ~second, second

    def edit(self, rows: Tensor, keys: Keys) -> Tensor:
        first, second = keys.marks
        raised = torch.where(first, rows + self.alpha * rows.abs(), rows)
        return torch.where(second, rows + self.beta * rows.abs(), raised)


def _stands_out(x: Tensor) -> Tensor:
    """Returns what is above the third quartile by more than 1.5 times the inner range, bool."""
    low, high = torch.quantile(x.float(), x.new_tensor([0.25, 0.75], dtype=torch.float32))
    return x > high + 1.5 * (high - low)
