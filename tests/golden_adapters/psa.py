"""PSA: importance of blocks, levels by it and by the keys, attention over pooled keys."""

from __future__ import annotations

from typing import Any

from tests.golden_harness import Output, Tensors
from vtprune.kernels.psa_attention import psa_attention
from vtprune.scoring.pyramid import coarsest, density, importance, levels_of


def from_golden(params: dict[str, Any], tensors: Tensors) -> dict[str, Output]:
    q, k, block = tensors["in.q"], tensors["in.k"], params["block"]
    weights = importance(q, k, block, params["stride"])
    bounds = {int(level): tuple(span) for level, span in params["ratios"].items() if int(level)}
    raw = levels_of(weights, bounds, -(-params["text_length"] // block))
    cap = coarsest(k, block, {int(n): least for n, least in params["sim_thresholds"].items()})
    levels = raw.minimum(cap[..., None, :])
    return {
        "out.importance": weights,
        "out.levels_raw": raw,
        "out.cap": cap,
        "out.levels": levels,
        "out.attn": psa_attention(q, k, tensors["in.v"], levels, block),
        "out.density": density(levels)[None],
    }
