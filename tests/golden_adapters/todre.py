"""ToDRE: a plain image, a tiled one whose pivot is in the thumbnail, and whether all leave."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import vtprune
from tests.golden_adapters._decoder import span
from tests.golden_harness import Output, Tensors
from vtprune.engine.rows import READERS
from vtprune.kernels.attn_rows import attn_rows
from vtprune.registry import build
from vtprune.strategies.todre import ToDRE, attended
from vtprune.types import Budget, ClsRow, Inside, Signals, TextRows


def from_golden(params: dict[str, Any], tensors: Tensors) -> dict[str, Output]:
    if params["stage"] == 2:
        return _exit(params, tensors)
    n, thumbnail, k = (params[name] for name in ("n_tokens", "thumbnail_tokens", "keep_count"))
    row = attn_rows(tensors["in.cls_q"][None], tensors["in.cls_k"][None])[:, 1:]
    tokens = tensors["in.tokens"][None]
    signals = Signals(tokens, values={ClsRow(23): F.pad(row, (0, n - thumbnail))})
    strategy = build("todre", objective=params["objective"], thumbnail=thumbnail)
    selection = vtprune.select(strategy, keep=k, signals=signals)
    assert isinstance(strategy, ToDRE)
    order = strategy.picks(signals, k)[0]
    return {"out.pivot": order[:1], "out.order": order, "out.keep": selection.rows}


def _exit(params: dict[str, Any], tensors: Tensors) -> dict[str, Output]:
    first, end = params["image_span"]
    visual = span(params["n_total"], (first, end))
    q, k = tensors["in.q"][None], tensors["in.k"][None]
    rows = READERS[TextRows](nn.Identity(), visual >= 0, visual)
    assert rows.asking(0).tolist() == list(range(*params["text_rows"]))
    value = rows._reduce(q, k, k, None)[:, first:end]
    n = end - first
    inside = Inside(0, (28,), 32, (n,), images=((n,),))
    signals = Signals(torch.zeros(1, n, 1), values={TextRows(28): value}, inside=inside)
    strategy = build("todre", exit=True, tau=params["tau"])
    (count,) = strategy.counts(signals, Budget.of(1.0))
    return {
        "out.a_tv": attended(signals),
        "out.a_vt": torch.zeros(1),  # the mask is causal
        "out.exit": torch.tensor([int(count == 0)]),
    }
