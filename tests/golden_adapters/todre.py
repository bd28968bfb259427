"""ToDRE, stage 1: a plain image, and a tiled one whose pivot is in the thumbnail."""

from __future__ import annotations

from typing import Any

import pytest
import torch.nn.functional as F

import vtprune
from tests.golden_harness import Output, Tensors
from vtprune.kernels.attn_rows import attn_rows
from vtprune.registry import build
from vtprune.strategies.todre import ToDRE
from vtprune.types import ClsRow, Signals


def from_golden(params: dict[str, Any], tensors: Tensors) -> dict[str, Output]:
    if params["stage"] != 1:
        pytest.skip("todre: only stage 1 of the method is there yet")
    n, thumbnail, k = (params[name] for name in ("n_tokens", "thumbnail_tokens", "keep_count"))
    row = attn_rows(tensors["in.cls_q"][None], tensors["in.cls_k"][None])[:, 1:]
    tokens = tensors["in.tokens"][None]
    signals = Signals(tokens, values={ClsRow(23): F.pad(row, (0, n - thumbnail))})
    strategy = build("todre", objective=params["objective"], thumbnail=thumbnail)
    selection = vtprune.select(strategy, keep=k, signals=signals)
    assert isinstance(strategy, ToDRE)
    order = strategy.picks(signals, k)[0]
    return {"out.pivot": order[:1], "out.order": order, "out.keep": selection.rows}
