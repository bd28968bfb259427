"""A strategy that keeps the tokens with the highest of scores made beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vtprune.errors import InputError
from vtprune.types import Signals, Strategy


@dataclass(frozen=True)
class Given(Strategy):
    """``scores``: per image and video of the one batch that it is for, ``[N]``, higher = kept.

    N counts the tokens that are made of patches.
    """

    scores: Sequence[Tensor] = field(repr=False, compare=False)

    def score(self, signals: Signals) -> Tensor:
        items = range(len(signals.tokens)) if signals.item is None else signals.item.tolist()
        lengths = [len(scores) for scores in self.scores]
        if any(i >= len(lengths) or lengths[i] != signals.n for i in items):
            raise InputError(
                f"Scores were given for images of {lengths} tokens; asked are those of images "
                f"{list(items)} with {signals.n} tokens. Wrap anew for each batch, without scope=."
            )
        return torch.stack([self.scores[i].to(signals.tokens.device) for i in items])
