"""DyCoke: one video; the official order of the tokens in a reduced frame is by similarity."""

from __future__ import annotations

from typing import Any

import torch

from tests.golden_adapters._video import clip, per_frame
from tests.golden_harness import Output, Tensors
from vtprune.scoring.temporal import changes, framed
from vtprune.strategies.dycoke import DyCoke, _references
from vtprune.types import Budget


def from_golden(params: dict[str, Any], tensors: Tensors) -> dict[str, Output]:
    frames, n = params["frames"], params["tokens_per_frame"]
    share = (1 + 3 * (1 - params["K"])) / 4
    signals = clip(tensors["in.x"], frames, share)
    strategy = DyCoke(compat=True)
    (k,) = strategy.counts(signals, Budget(fraction=share))
    kept = strategy.select(signals, k).rows[0]
    counts = per_frame(kept, frames, n)
    tokens = framed(signals)
    changed = changes(tokens, tokens[:, _references(frames)])[0].flatten()
    order = [
        own if len(own) == n else own[changed[own].argsort(descending=True, stable=True)]
        for own in (kept[kept // n == t] for t in range(frames))
    ]
    return {"out.keep": kept, "out.order": torch.cat(order), "out.per_frame": counts}
