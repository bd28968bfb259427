"""PruMerge and PruMerge+, with as many tokens as the attention's outliers say."""

from __future__ import annotations

from typing import Any

import vtprune
from tests.golden_harness import Output, Tensors
from vtprune.kernels.attn_rows import attn_rows
from vtprune.registry import build
from vtprune.types import Signals, WideClsRow, WideKeys


def from_golden(params: dict[str, Any], tensors: Tensors) -> dict[str, Output]:
    q, k, tokens = tensors["in.q23"], tensors["in.k23"], tensors["in.hidden"][:, 1:]
    row = attn_rows(q[:, None, :1], k[:, None])[:, 1:]
    signals = Signals(tokens, values={WideClsRow(23): row, WideKeys(23): k[:, 1:]})
    options = {} if params["plus"] else {"compat": params["batch"] > 1}
    strategy = build(
        "prumerge_plus" if params["plus"] else "prumerge",
        neighbours=params["neighbours_merged"],
        adaptive=True,
        **options,
    )
    selection = vtprune.select(strategy, keep=1.0, signals=signals)
    assert bool((selection.rows[:, -1] == -1).all())
    order = selection.rows[:, :-1]
    return {
        "out.keep": order.sort(dim=1).values,
        "out.order": order,
        "out.tokens": selection.apply(tokens),
        "out.scores": row,
    }
