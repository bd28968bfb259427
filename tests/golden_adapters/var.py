"""VAR: attention of a layer before and after what sinks hold is handed to the image."""

from __future__ import annotations

from typing import Any

import torch

from tests.golden_harness import Output, Tensors
from vtprune.scoring.sinks import image_centric, rescale_attention, sink_score


def from_golden(params: dict[str, Any], tensors: Tensors) -> dict[str, Output]:
    q, k = tensors["in.q"], tensors["in.k"]
    queries, keys = q.shape[2], k.shape[2]
    place = torch.arange(keys)
    start, end = params["image_start"], params["image_start"] + params["image_len"]
    visual = ((place >= start) & (place < end))[None]
    row = keys - queries + torch.arange(queries)
    logits = q @ k.mT / params["head_dim"] ** 0.5
    attention = logits.masked_fill(place > row[:, None], -torch.inf).softmax(-1)
    score = sink_score(tensors["in.hidden"], params["dims"])
    sinks = score > params["tau"]
    share = 1 - params["rho"]
    centric = image_centric(attention, visual, sinks, least=params["summ"], share=share)
    changed = centric & (row >= end)
    moved = rescale_attention(
        attention,
        sinks[:, None, None],
        1 - params["moved_fraction"],
        (visual & ~sinks)[:, None, None],
    )
    return {
        "out.sink_score": score,
        "out.sinks": sinks[0].nonzero()[:, 0],
        "out.qualified": centric,
        "out.changed": changed,
        "out.attn": attention,
        "out.attn_new": torch.where(changed[..., None], moved, attention),
    }
