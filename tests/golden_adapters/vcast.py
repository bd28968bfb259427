"""V-CAST: videos one after another, each with its share of the budget."""

from __future__ import annotations

from itertools import accumulate
from math import prod
from typing import Any

import torch

from tests.golden_adapters._video import clip, per_frame
from tests.golden_harness import Output, Tensors
from vtprune.scoring.temporal import curvature, framed
from vtprune.strategies.vcast import VCast
from vtprune.types import Budget


def from_golden(params: dict[str, Any], tensors: Tensors) -> dict[str, Output]:
    strategy = VCast(params["temperature"], params["min_k"], compat=True)
    share, merged = params["retain_ratio"], params["spatial_merge_size"] ** 2
    grids = params["grid_thw"]
    sizes = [prod(grid) // merged for grid in grids]
    kept, counts, turns = [], [], []
    for first, (frames, *_), tokens in zip(
        accumulate([0, *sizes]), grids, tensors["in.x"].split(sizes), strict=False
    ):
        signals = clip(tokens, frames, share)
        (k,) = strategy.counts(signals, Budget(fraction=share))
        rows = torch.arange(k) if k == signals.n else strategy.select(signals, k).rows[0]
        kept.append(first + rows)
        counts.append(per_frame(rows, frames, signals.n // frames))
        turns.append(curvature(framed(signals))[0])
    keep = torch.cat(kept)
    return {
        "out.keep": keep,
        "out.tokens": tensors["in.x"][keep],
        "out.deepstack": tensors["in.deepstack"][keep],
        "out.per_frame": torch.cat(counts),
        "out.curvature": torch.cat(turns),
    }
