"""FastV: the ranking from recorded queries and keys, and a whole model against its mask form."""

from __future__ import annotations

from typing import Any

from torch import Tensor

import vtprune
from tests.golden_adapters._decoder import llama, span, staged
from tests.golden_harness import Output, Tensors
from vtprune.kernels.attn_rows import attn_rows
from vtprune.registry import build
from vtprune.types import LastRow, Signals


def from_golden(params: dict[str, Any], tensors: Tensors) -> dict[str, Output]:
    strategy = build("fastv", layers=(params["drop_before_layer_idx"],))
    assert strategy.positions == params["position_policy"]
    first, end = params["image_span"]
    visual = span(params["n_total"], (first, end))
    if "in.inputs_embeds" in tensors:
        return _whole_model(strategy, params, tensors, visual)
    q, k = tensors["in.q"], tensors["in.k"]
    row = attn_rows(q[:, :, -1:], k)[:, first:end]
    hidden = tensors["in.hidden"]
    signals = Signals(hidden[:, first:end], values={LastRow(params["score_layer_idx"]): row})
    selection = vtprune.select(strategy, keep=params["keep_count"], signals=signals)
    keep = _columns(visual, first + selection.rows)
    ours: dict[str, Output] = {
        "out.scores": strategy.score(signals),
        "out.keep": keep,
        "out.position_ids": keep,
    }
    if "out.tokens" in tensors:
        ours["out.tokens"] = hidden[:, keep[0]]
    return ours


def _columns(visual: Tensor, kept: Tensor) -> Tensor:
    """Columns that stay, ``[1, K]``: all but the image, and ``kept`` of it."""
    stays = ~visual
    stays[0, kept[0]] = True
    return stays[0].nonzero()[:, 0][None]


def _whole_model(
    strategy: Any, params: dict[str, Any], tensors: Tensors, visual: Tensor
) -> dict[str, Output]:
    model = llama(params, tensors)
    with staged(model, strategy, params["keep_count"], visual) as decoding:
        out = model(inputs_embeds=tensors["in.inputs_embeds"][None])
    cut = decoding.final()
    assert cut is not None
    (row,) = decoding.rows.values()
    ours: dict[str, Output] = {
        "out.scores": row[visual][None],
        "out.keep": cut.index,
        "out.last_hidden_state": out.last_hidden_state[0],
    }
    if "out.position_ids" in tensors:
        ours["out.position_ids"] = cut.index
    return ours
