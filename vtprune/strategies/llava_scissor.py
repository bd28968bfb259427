"""LLaVA-Scissor: tokens that are alike form components, in frames, then over the video; one each.

Each component is a mean of means; every token is then added to the one that it is most like, and
averaged. The prefill gets shorter. arXiv 2506.21862 (HumanMLLM/LLaVA-Scissor). The official code
has a threshold in place of a budget, and looks at some nodes of large frames; here the threshold is
the one that leaves what is asked, the most alike joining where it leaves more, and all are looked
at. Defaults: ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vtprune.errors import ConfigError
from vtprune.scoring.components import components, fitting
from vtprune.scoring.diversity import nearest
from vtprune.scoring.still import Made, stacked
from vtprune.scoring.temporal import broken, framed
from vtprune.strategies._frames import OfFrames
from vtprune.types import Budget, Selection, Signals


@dataclass(frozen=True)
class LLaVAScissor(OfFrames):
    """``tau``: the cosine above which tokens join, officially 0.9 or 0.95; None = by the budget.

    With it the budget is what stays at most.
    """

    tau: float | None = None

    def __post_init__(self) -> None:
        if self.tau is not None and not -1 <= self.tau <= 1:
            raise ConfigError(f"tau={self.tau!r} must be a cosine, from -1 to 1, or None.")

    def of_videos(self, signals: Signals, budget: Budget) -> list[int]:
        most = super().of_videos(signals, budget)
        if self.tau is None or budget.share(signals.n) == 1:
            return most
        found = [len(components(x, self.tau).rows) for x in framed(signals)]
        return [min(pair) for pair in zip(most, found, strict=True)]

    def select(self, signals: Signals, k: int) -> Selection:
        bad = broken(signals)
        made = [self._made(x, b, k) for x, b in zip(framed(signals), bad, strict=True)]
        return stacked(made, signals.n)

    def _made(self, x: Tensor, bad: Tensor, k: int) -> Made:
        found = fitting(x, k) if self.tau is None else components(x, self.tau, k)
        flat, of, every = x.flatten(0, 1), found.of, torch.arange(len(bad), device=x.device)
        weighted = flat * found.weight[:, None]
        means = torch.zeros(k, flat.shape[1], device=x.device).index_add_(0, of, weighted)
        to = nearest(flat[None], means[None])[0]
        count = 1 + torch.bincount(to[~bad], minlength=k).float()
        lost = torch.bincount(of[~bad], minlength=k) == 0  # there is nothing sound in these
        own = ~bad | lost[of]
        return Made(
            found.rows,
            torch.cat([every[own], every[~bad]]),
            torch.cat([of[own], to[~bad]]),
            torch.cat([(found.weight / count[of])[own], (1 / count[to])[~bad]]),
        )
