"""Contrastive decoding: the logits of a model with, or against, those of another view.

B prompts, L columns, V ids.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel

from vtprune.contrast.branch import Branch
from vtprune.engine.plan import wrap
from vtprune.engine.twin import twin
from vtprune.errors import ConfigError
from vtprune.types import Strategy


class ContrastiveDecoder(LogitsProcessor):
    """A logits processor that runs the same model on another view, beside the one that generates.

    Of the logits ``l`` of the run and those of the view ``v`` it makes ``(1 + alpha) l - alpha v``
    where ``sign`` is -1, and ``l + alpha v`` where it is 1. What ``l`` holds less likely than
    ``beta`` times the best token is left out. With ``alpha=0, beta=0`` nothing changes. The model
    that generates may be wrapped, in another way; the view has a cache of its own, so memory and
    time of the language model about double.

    It goes to ``generate(**batch, logits_processor=[...])``, greedy, sampling or with beams, whose
    ``batch`` names the same ids. Take its hooks off by ``remove()`` or a ``with`` block. A contrast
    is made of log-probabilities, which is the same but for beams.

    Args:
        model: the model that generates.
        batch: what the view reads: the same ids, with the same image or another of equal size.
        strategy: whose selection the view is, as ``wrap`` takes it; None = all tokens.
        alpha: of at least 0.
        beta: from 0, which leaves nothing out, to 1.
        sign: -1 against the view, 1 with it.
        **options: as ``wrap`` takes them, such as ``keep``.

    Raises:
        ConfigError: a value out of range, or options without a strategy.
        InputError: the batch has no prompt; in a call, a text that is no continuation of it.
        UnsupportedError: a model or strategy that cannot be served.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batch: Mapping[str, Any],
        strategy: str | Strategy | None = None,
        *,
        alpha: float,
        beta: float = 0.1,
        sign: Literal[-1, 1] = -1,
        **options: Any,
    ) -> None:
        _check(alpha, beta, sign)
        if strategy is None and options:
            raise ConfigError(f"{', '.join(options)}: the view has no strategy; name one.")
        self.alpha, self.beta, self.sign = alpha, beta, sign
        view = twin(model)
        self.branch = Branch(view, batch)
        self.handle = None if strategy is None else wrap(view, strategy, **options)

    def __enter__(self) -> ContrastiveDecoder:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Takes the view's hooks off; a second call does nothing."""
        if self.handle is not None:
            self.handle.remove()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        """Returns the contrasted ``scores`` ``[R, V]`` of the token after ``input_ids``."""
        view = self.branch.logits(input_ids).to(scores.device)
        return contrasted(scores, view, self.alpha, self.beta, self.sign)


def contrasted(full: Tensor, view: Tensor, alpha: float, beta: float, sign: int) -> Tensor:
    """Returns logits ``full`` ``[R, V]`` contrasted with those of a ``view``; see the class."""
    if alpha:
        made = (1 + alpha) * full - alpha * view if sign < 0 else full + alpha * view
        made = made.log_softmax(-1)  # beams add the scores of steps up
    else:
        made = full
    floor = full.amax(-1, keepdim=True) + (math.log(beta) if beta else -math.inf)
    return made.masked_fill(full < floor, -torch.inf)


def _check(alpha: float, beta: float, sign: int) -> None:
    numbers = {"alpha": (alpha, math.inf, "at least 0"), "beta": (beta, 1, "from 0 to 1")}
    for name, (value, most, allowed) in numbers.items():
        real = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not real or not 0 <= value <= most or math.isinf(value):
            raise ConfigError(f"{name}={value!r} must be a number, {allowed}.")
    if sign not in (-1, 1):
        raise ConfigError(f"sign={sign!r} must be -1 (against the view) or 1 (with it).")
