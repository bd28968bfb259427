"""ToFu: one step among recorded states, of early blocks or of later ones."""

from __future__ import annotations

from typing import Any

from tests.golden_adapters._merge import Merge
from tests.golden_harness import Output, Tensors
from vtprune.strategies.tofu import ToFu


def from_golden(params: dict[str, Any], tensors: Tensors) -> dict[str, Output]:
    merge = Merge(tensors, int(params["class_token"]))
    early, ported = params["strategy"].startswith("prune"), "port" in params["strategy"]
    layer = 0 if early else 11
    return merge.run(ToFu(compat=ported), merge.signals.n - params["r"], merge.at(layer, 12))
