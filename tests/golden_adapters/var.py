"""VAR: attention of a layer before and after what sinks hold is handed to the image."""

from __future__ import annotations

from typing import Any

import torch

from tests.golden_harness import Output, Tensors
from vtprune.interventions import Entering, Keys
from vtprune.scoring.sinks import image_centric, sink_score
from vtprune.strategies.var import VAR


def from_golden(params: dict[str, Any], tensors: Tensors) -> dict[str, Output]:
    q, k = tensors["in.q"], tensors["in.k"]
    queries, keys = q.shape[2], k.shape[2]
    place = torch.arange(keys)
    start, end = params["image_start"], params["image_start"] + params["image_len"]
    visual = ((place >= start) & (place < end))[None]
    row = keys - queries + torch.arange(queries)
    logits = q @ k.mT / params["head_dim"] ** 0.5
    attention = logits.masked_fill(place > row[:, None], -torch.inf).softmax(-1)
    hidden, share = tensors["in.hidden"], 1 - params["rho"]
    strategy = VAR(
        dims=tuple(params["dims"]),
        tau=params["tau"],
        rho=share,
        least=params["summ"],
        moved_fraction=params["moved_fraction"],
    )
    there, first = torch.ones_like(visual), place[None] == 0
    (sinks,) = strategy.mark(Entering(hidden, there, visual, first, visual.long() - 1, {}))
    known = Keys(visual[:, None, None], first[:, None, None], (sinks[:, None, None],))
    centric = image_centric(attention, visual, sinks, least=params["summ"], share=share)
    after = row >= end
    edited = strategy.edit(attention, known)
    return {
        "out.sink_score": sink_score(hidden, params["dims"]),
        "out.sinks": sinks[0].nonzero()[:, 0],
        "out.qualified": centric,
        "out.changed": centric & after,
        "out.attn": attention,
        "out.attn_new": torch.where(after[:, None], edited, attention),
    }
