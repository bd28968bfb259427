"""ZipVL: probes, how many tokens they need, which those are, attention among them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from tests.golden_harness import Output, Tensors
from vtprune.scoring.probing import accumulated, important, needed, per_viewer, probes


def from_golden(params: dict[str, Any], tensors: Tensors) -> dict[str, Output]:
    n, recent, chance = (params[f] for f in ("n_tokens", "probe_recent", "probe_random"))
    rows = tensors["in.probe_rows"]  # those by chance are of another generator
    ours = probes(n, recent, chance)
    assert (ours.shape, ours[-recent:].tolist()) == (rows.shape, rows[-recent:].tolist())
    q, k, v = (tensors[f"in.{name}"][None] for name in "qkv")
    seen = torch.arange(n) <= rows[:, None]
    mass = accumulated(q[:, :, rows], k, seen)
    counts, scores = needed(mass, params["tau"], len(rows)), per_viewer(mass, seen)
    always = torch.zeros(1, n, dtype=torch.bool)
    always[0, params["forced_tokens"]] = True
    keep = important(scores, counts, always).nonzero()[:, 1]
    query, key, value = (x[:, :, keep] for x in (q, k, v))
    return {
        "out.accumulated": mass[0],
        "out.normalised": scores[0],
        "out.count": counts,
        "out.keep": keep[None],
        "out.attn": F.scaled_dot_product_attention(query, key, value, is_causal=True)[0],
    }
