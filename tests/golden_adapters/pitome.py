"""PiToMe: one merge of recorded states, at a given margin and in one of the two ways of pairing."""

from __future__ import annotations

from typing import Any

from tests.golden_adapters._merge import Merge
from tests.golden_harness import Output, Tensors
from vtprune.kernels.topk_sorted import ranked
from vtprune.scoring.diversity import unit
from vtprune.scoring.energy import energies
from vtprune.strategies.pitome import PiToMe


def from_golden(params: dict[str, Any], tensors: Tensors) -> dict[str, Output]:
    merge = Merge(tensors, int(params["class_token"]))
    states = params["metric"].startswith("hidden states")
    strategy = PiToMe(
        metric="states" if states else "keys",
        margin=params["margin"],
        alpha=params["alpha"],
        bsm=float(params["variant"] == "pitome_bsm"),
    )
    outputs = merge.run(strategy, merge.signals.n - params["r"])
    metric = merge.signals.tokens if states else merge.keys
    x, _ = unit(metric)
    energy = energies(x @ x.mT, params["margin"], params["alpha"])
    return {**outputs, "out.energy": energy, "out.rank": ranked(energy)}
