"""MCTF: one merge of recorded states, and of the attention map where it is merged too."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import vtprune
from tests.golden_adapters._merge import Merge
from tests.golden_harness import Output, Tensors
from vtprune.engine.reduction import maps
from vtprune.engine.vit import merged
from vtprune.types import Received

POOLS = {
    "attention x size weighted mean": "attention",
    "size-weighted mean": "size",
    "plain mean": "mean",
}


def from_golden(params: dict[str, Any], tensors: Tensors) -> dict[str, Output]:
    case, p = Merge(tensors, params["num_protected"]), params["num_protected"]
    added = case.size.log()[:, None, None] if params["prop_attn"] else None
    attention = maps(tensors["in.q"], tensors["in.k"], None, added)
    received = attention.mean((1, 2))[:, p:]
    n = case.signals.n
    r = params["r"] if params["r"] >= 1 else int(params["r"] * n)
    selection = vtprune.select(
        "mctf",
        keep=n - min(r, n // 2),
        signals=replace(case.signals, values={Received(0): received}),
        tau_likeness=params["tau_sim"],
        tau_attention=params["tau_info"],
        tau_size=params["tau_size"],
        both_ways=params["bidirectional"],
        pool=POOLS[params["pooling"]],
    )
    outputs = case.outputs(selection)
    if "out.attn_next" in tensors:
        recorded, order = tensors["out.attn_next"], tensors["out.order"].argsort(dim=1)
        at = order[:, None, :, None].expand_as(recorded)
        ours = merged(attention, selection, p)
        outputs["out.attn_next"] = (ours, recorded.gather(2, at).gather(3, at.mT))
    return outputs
