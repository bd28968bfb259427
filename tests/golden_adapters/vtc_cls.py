"""VTC-CLS: images with the q and k of more blocks than the ensemble reads."""

from __future__ import annotations

from typing import Any

import vtprune
from tests.golden_adapters._tower import signals_of, tower
from tests.golden_harness import Output, Tensors
from vtprune.registry import build
from vtprune.strategies.vtc_cls import DEPTH


def from_golden(params: dict[str, Any], tensors: Tensors) -> dict[str, Output]:
    first, blocks = params["start_layer_0based"], params["num_blocks"]
    own_depth = blocks == DEPTH  # ``start`` is stated in the authors' depth and mapped to others
    option = {"start": first} if own_depth else {"layers": tuple(range(first, blocks - 1))}
    strategy = build("vtc_cls", **option)
    facts = tower(blocks)
    signals = signals_of(strategy, facts, tensors)
    used = strategy.used_layers(facts)
    assert list(used) == params["layers_used_0based"]
    for block in set(range(blocks)) - set(used):
        for name in (f"in.q{block}", f"in.k{block}"):
            if name in tensors:
                tensors.ignore(name, f"block {block} is not in the ensemble {used}")
    selection = vtprune.select(strategy, keep=params["token_num"], signals=signals)
    return {
        "out.keep": selection.rows,
        "out.tokens": selection.apply(signals.tokens),
        "out.scores": strategy.score(signals),
    }
