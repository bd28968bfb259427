"""EVS: one video after the merger."""

from __future__ import annotations

from typing import Any

from tests.golden_adapters._video import clip, per_frame
from tests.golden_harness import Output, Tensors
from vtprune.strategies.evs import EVS
from vtprune.types import Budget


def from_golden(params: dict[str, Any], tensors: Tensors) -> dict[str, Output]:
    frames, n = params["grid_thw"][0], params["tokens_per_frame"]
    share = 1 - params["pruning_rate"]
    signals = clip(tensors["in.x"], frames, share)
    strategy = EVS(compat=True)
    k = strategy.counts(signals, Budget(fraction=share))[0]
    kept = strategy.select(signals, k).rows[0]
    return {"out.keep": kept, "out.per_frame": per_frame(kept, frames, n)}
