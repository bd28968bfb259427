"""FastVID: one video, with the features of its frames and the salience of SigLIP's head."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from tests.golden_adapters._video import clip
from tests.golden_harness import Output, Tensors
from vtprune.strategies.fastvid import FastVID
from vtprune.types import ClsRow


def from_golden(params: dict[str, Any], tensors: Tensors) -> dict[str, Output]:
    strategy = FastVID(
        params["DySeg_c"],
        params["DySeg_tau"],
        params["STPrune_d"],
        params["DTM_p"],
        params["DTM_beta"],
        compat=True,
    )
    x, features, share = tensors["in.x"], tensors["in.glob"], params["retention_ratio"]
    frames, n, _ = x.shape
    spans = strategy.spans(features)
    salient, anchors = strategy._official(spans, n, share)
    signals = clip(x, frames, share)
    signals.values = {ClsRow(0): tensors["in.attn"].flatten()[None]}
    made = strategy.decide(signals, features[None], sum(salient) + sum(anchors))
    tops = tensors["in.attn"].topk(salient[0]).indices.sort(dim=1).values
    assert torch.isin(tops + torch.arange(frames)[:, None] * n, made.rows[0]).all()
    return {
        "out.tokens": made.apply(signals.tokens)[0],
        "out.keep": made.rows[0],
        "out.segments": torch.tensor([end - first for first, end in spans]),
        "out.context_per_frame": torch.tensor(anchors),
        "out.salient": tops,
        "out.frame_similarity": F.cosine_similarity(features[:-1], features[1:], dim=-1),
    }
