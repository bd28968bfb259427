"""QuoTA: frames get tokens by how much they have to say about the question.

Each frame is scored by the question, and the square of its score is its share of the budget; frames
that get no token leave. The prefill gets shorter. arXiv 2503.08689 (MAC-AutoML/QuoTA). The authors
ask a small vision-language model about every frame, which ``vtprune.scoring.asking.Judge`` does,
once per question: ``p = judge(frames, question)`` and ``scorer=lambda frames, question: p``. The
default costs next to nothing: a frame's score is the mean relevance of its tokens to the
instruction, by CLIP's text tower where ``wrap`` is given one, stretched to (0, 1] over the video.
Officially a frame is then resized, up too; here ``keep`` is of the tokens there are, and a frame
keeps its most relevant ones, or as many as ``reducer`` makes of it. Frames that have no room hand
on what they cannot take. Defaults: official code; the scorer and reducer ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite
from typing import Literal, get_args

import torch
from torch import Tensor

from vtprune.errors import ConfigError, InputError
from vtprune.scoring.guidance import guidance, guidance_needs, unit_range
from vtprune.scoring.shrinking import RECTANGLES, SHRINKING, Grid, area
from vtprune.scoring.still import Made, joined_up, stacked
from vtprune.scoring.temporal import best_of_frames, broken, capped, framed, rounded
from vtprune.strategies._frames import OfFrames
from vtprune.types import Budget, Facts, Frames, Need, Selection, Signals

# Tokens of a video [T, N, D], and the instruction's embeddings [M, D], to scores [T] from 0 on.
FrameScorer = Callable[[Tensor, Tensor], Tensor]
Reducer = Literal["topk", "linspace", "tome", "interpolate", "pool"]


@dataclass(frozen=True)
class Quota(OfFrames):
    """``scorer``: what scores frames, see above; of two scores per frame, and so on, the mean.

    It is given the tokens of a video ``[T, N, D]`` and the instruction's embeddings ``[M, D]``, and
    returns ``[T]`` from 0 on. ``power``: of scores. ``reducer``: ``topk`` keeps the most relevant
    tokens of a frame, ``linspace`` some at even distances, ``tome`` merges the most similar ones;
    ``interpolate`` and ``pool`` make a smaller picture, of so many tokens at most. ``compat``
    rounds the budgets of frames down.
    """

    scorer: FrameScorer | None = None
    power: float = 2.0
    reducer: Reducer = "topk"
    compat: bool = False

    def __post_init__(self) -> None:
        if self.scorer is not None and not callable(self.scorer):
            raise ConfigError(
                f"scorer={self.scorer!r} is no function of frames and a question. For scores that "
                "you have give lambda frames, question: scores."
            )
        if not (self.power >= 0 and isfinite(self.power)):
            raise ConfigError(f"power={self.power!r} must be a number of at least 0.")
        if self.reducer not in get_args(Reducer):
            known = ", ".join(map(repr, get_args(Reducer)))
            raise ConfigError(f"reducer={self.reducer!r} is unknown; choose one of {known}.")

    def needs(self, facts: Facts) -> tuple[Need, ...]:
        return (Frames(), *guidance_needs(facts))

    def of_videos(self, signals: Signals, budget: Budget) -> list[int]:
        k = budget.count(signals.n)
        exact = not self.compat and self.reducer not in RECTANGLES
        if exact or k == signals.n:
            return super().of_videos(signals, budget)
        return self.quotas(signals, k).sum(1).tolist()

    def select(self, signals: Signals, k: int) -> Selection:
        asked = k if signals.budget is None else signals.budget.count(signals.n)
        quotas, frames = self.quotas(signals, asked), framed(signals)
        if self.reducer == "topk":
            score = guidance(signals).view(frames.shape[:3])
            return Selection(best_of_frames(score, quotas, broken(signals), k), signals.n)
        shrink, grid, made = SHRINKING[self.reducer], _grid(signals), []
        for x, own in zip(frames, quotas.tolist(), strict=True):
            parts = [
                _later(shrink(frame, grid, n), t * len(frame))
                for t, (frame, n) in enumerate(zip(x, own, strict=True))
                if n
            ]
            made.append(joined_up(parts, ascending=True))
        return stacked(made, signals.n)

    def quotas(self, signals: Signals, k: int) -> Tensor:
        """Returns what each frame keeps of ``k`` tokens, ``[B, T]`` int64, at least one in all."""
        weights = self.scores(signals) ** self.power
        n = signals.n // weights.shape[1]
        exact = capped(weights, k, n)
        given = exact.floor().long() if self.compat else rounded(exact, k, n)
        none = given.sum(1) == 0
        given[none, weights[none].argmax(1)] = 1
        if self.reducer not in RECTANGLES:
            return given
        sizes = [[area(own, _grid(signals)) for own in row] for row in given.tolist()]
        return torch.tensor(sizes, device=given.device)

    def scores(self, signals: Signals) -> Tensor:
        """Returns the scores of frames, ``[B, T]`` float32 from 0 on.

        Raises:
            InputError: the scorer returned something else, or the signals hold no text.
        """
        frames = framed(signals)
        if self.scorer is None:
            relevant = guidance(signals).view(frames.shape[:3]).nanmean(2)
            return unit_range(relevant, None).nan_to_num(0.0)
        if signals.text is None:
            raise InputError("The signals hold no text; give the instruction's embeddings per row.")
        pairs = zip(frames, signals.text, strict=True)
        return torch.stack([_checked(self.scorer(x, text), x) for x, text in pairs])


def _checked(scores: Tensor, frames: Tensor) -> Tensor:
    """Returns what a scorer gave as ``[T]``, the mean where it gave several per frame."""
    given, n = torch.as_tensor(scores).to(frames.device, torch.float32), len(frames)
    if given.ndim != 1 or not len(given) or len(given) % n:
        raise InputError(
            f"scorer returned scores of shape {tuple(given.shape)} for {n} frames; return one per "
            "frame, or equally many for each."
        )
    if not bool(((given >= 0) & given.isfinite()).all()):
        raise InputError(
            "scorer returned scores below 0, or none at all; return numbers from 0 on."
        )
    return given.view(n, -1).mean(1)


def _later(made: Made, first: int) -> Made:
    """Returns what was made of a frame whose tokens begin at ``first``."""
    return Made(made.rows + first, made.source + first, made.target, made.weight)


def _grid(signals: Signals) -> Grid:
    """Returns rows and columns of a frame; one row where there is no grid."""
    return (signals.grid or (1, 1, signals.n))[1:]
