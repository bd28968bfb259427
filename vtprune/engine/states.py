"""Readers of what enters a layer of the language model: hidden states, and rotary embeddings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vtprune.kernels._common import full_precision
from vtprune.types import DecoderNeed, FirstState, Likeness, Normed, TextState, Turned

# Of the model, hidden states [B, n, D], what else the layer is called with, and which of the n
# columns are tokens, and visual ones, [B, n] bool.
Reading = Callable[[Any, Tensor, dict[str, Any], Tensor, Tensor], Tensor]


def _normed(
    model: Any, hidden: Tensor, kwargs: dict[str, Any], valid: Tensor, visual: Tensor
) -> Tensor:
    return model.norm(hidden).to(hidden.device, torch.float32)


def _likeness(
    model: Any, hidden: Tensor, kwargs: dict[str, Any], valid: Tensor, visual: Tensor
) -> Tensor:
    value = torch.zeros(valid.shape, device=hidden.device)
    after = valid & (visual.flip(1).cumsum(1).flip(1) == 0)
    with full_precision(hidden):
        for b in (visual.any(1) & after.any(1)).nonzero()[:, 0].tolist():
            states = hidden[b].float()
            value[b, after[b]] = (states[visual[b]] @ states[after[b]].T).softmax(-1).mean(0)
    return value


def _turned(
    model: Any, hidden: Tensor, kwargs: dict[str, Any], valid: Tensor, visual: Tensor
) -> Tensor:
    cos, sin = (x.float().expand(len(hidden), -1, -1) for x in kwargs["position_embeddings"])
    half = sin.shape[-1] // 2
    return cos + torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)


def _text_state(
    model: Any, hidden: Tensor, kwargs: dict[str, Any], valid: Tensor, visual: Tensor
) -> Tensor:
    value = torch.zeros(len(hidden), 2 * hidden.shape[2], device=hidden.device)
    after = valid & (visual.flip(1).cumsum(1).flip(1) == 0)
    for b in visual.any(1).nonzero()[:, 0].tolist():
        spots = after[b].nonzero()[:, 0]
        spots = spots if len(spots) else valid[b].nonzero()[-1:, 0]
        states = hidden[b, spots].float()
        before = states[:-1] if len(states) > 1 else states  # the mean of none is no number
        value[b] = torch.cat([before.mean(0), states[-1]])
    return value


def _first_state(
    model: Any, hidden: Tensor, kwargs: dict[str, Any], valid: Tensor, visual: Tensor
) -> Tensor:
    rows = torch.arange(len(hidden), device=hidden.device)
    return hidden[rows, valid.long().argmax(1)].float()


STATES: dict[type[DecoderNeed], Reading] = {
    FirstState: _first_state,
    Normed: _normed,
    Likeness: _likeness,
    TextState: _text_state,
    Turned: _turned,
}
