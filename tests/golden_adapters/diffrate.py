"""DiffRate: one block among recorded states, by counts of its own."""

from __future__ import annotations

from typing import Any

from tests.golden_adapters._merge import Merge
from tests.golden_harness import Output, Tensors
from vtprune.scoring.attention import salience
from vtprune.strategies.diffrate import DiffRate


def from_golden(params: dict[str, Any], tensors: Tensors) -> dict[str, Output]:
    merge = Merge(tensors, 1)
    lists = ((params["prune_kept"],), (params["merge_kept"],))
    strategy = DiffRate(rates=lists, tokens=params["N"])
    outputs = merge.run(strategy, params["merge_kept"] - 1, merge.at(0, 1))
    return {**outputs, "out.scores": salience(merge.signals)}
