"""EViT: one stage among recorded states, by recorded queries and keys."""

from __future__ import annotations

from typing import Any

import torch

import vtprune
from tests.golden_adapters._merge import Merge, rows_of
from tests.golden_harness import Output, Tensors
from vtprune.scoring.attention import salience
from vtprune.strategies.evit import EViT


def from_golden(params: dict[str, Any], tensors: Tensors) -> dict[str, Output]:
    tensors.ignore("in.v", "attention is an input of the score alone; in.x is what comes after it")
    merge, fuse, kept = Merge(tensors, 1), params["fuse_token"], params["kept"]
    signals = merge.signals
    chosen = vtprune.select(EViT(fuse=fuse), keep=kept + int(fuse), signals=signals)
    rows, cls = chosen.rows[:, :kept] + 1, torch.zeros(len(merge.x), 1, dtype=torch.int64)
    tokens = torch.cat([merge.x[:, :1], chosen.apply(signals.tokens)], dim=1)
    recorded = tensors["out.order"].argsort(dim=1) + 1
    last = recorded.new_full((len(rows), int(fuse)), kept + 1)
    place = torch.cat([cls, recorded, last], dim=1)
    score = salience(signals)
    return {
        "out.tokens": (tokens, rows_of(tensors["out.tokens"], place)),
        "out.order": (rows, tensors["out.order"].sort(dim=1).values),
        "out.keep": torch.cat([cls, rows], dim=1),
        "out.scores": score,
    }
