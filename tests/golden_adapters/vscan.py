"""VScan: the encoder's selection and merging with and without [CLS], and the stage inside."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.models.qwen2_vl.modeling_qwen2_vl import rotate_half

from tests.golden_harness import Output, Tensors
from vtprune.kernels.attn_received import attn_received
from vtprune.kernels.attn_rows import attn_rows
from vtprune.strategies.vscan import VScan
from vtprune.types import Budget, ClsRow, Inside, LastRow, Quantity, Received, Signals


def from_golden(params: dict[str, Any], tensors: Tensors) -> dict[str, Output]:
    if params["stage"] == "llm":
        return _inside(params, tensors)
    return _clip(params, tensors) if "in.features" in tensors else _qwen(params, tensors)


def _clip(params: dict[str, Any], tensors: Tensors) -> dict[str, Output]:
    shallow, deep = (
        attn_rows(tensors[f"in.{at}.q"][:, :, :1], tensors[f"in.{at}.k"])[:, 1:]
        for at in ("shallow", "deep")
    )
    weight, bias = tensors["in.mm_projector.weight"], tensors["in.mm_projector.bias"]
    projected = F.linear(tensors["in.features"], weight, bias)
    layers = params["shallow_layer_idx"], params["deep_layer_idx"]
    values: dict[Quantity, Tensor] = {ClsRow(layers[0]): shallow, ClsRow(layers[1]): deep}
    signals = Signals(projected, (1, *params["grid"]), values=values)
    ours = _encoder(signals, params["visual_token_num"])
    return {**ours, "out.projected": projected, "out.shallow_scores": shallow} | {
        "out.deep_scores": deep
    }


def _qwen(params: dict[str, Any], tensors: Tensors) -> dict[str, Output]:
    order = tensors["in.window_index"].argsort()
    cos, sin = tensors["in.rope_cos"], tensors["in.rope_sin"]
    found: list[Tensor] = []
    for at in ("local", "global"):
        q, k = (tensors[f"in.{at}.{x}"][None] for x in "qk")
        q, k = (x * cos + rotate_half(x) * sin for x in (q, k))
        found.append(attn_received(q, k).unflatten(1, (-1, 4)).mean(2)[:, order])
    values: dict[Quantity, Tensor] = {Received(7): found[0], Received(31): found[1]}
    signals = Signals(tensors["in.image_embeds"][None], (1, *params["merged_grid"]), values=values)
    ours = _encoder(signals, params["num_keep"])
    heads = params["heads"]  # theirs is the sum over heads
    scores = {"out.local_scores": found[0][0] * heads, "out.global_scores": found[1][0] * heads}
    return {**ours, **scores, "out.local": ours["out.local"][0]}


def _encoder(signals: Signals, k: int) -> dict[str, Any]:
    strategy = VScan(inside=False, compat=True)  # their count, where windows share unevenly
    counts = strategy.counts(signals, Budget.of(k))
    selection = strategy.select(signals, counts[0])
    local = strategy.local(signals, counts[0])
    return {
        "out.keep": selection.rows,
        "out.tokens": selection.apply(signals.tokens),
        "out.local": local.nonzero()[:, 1].view(len(local), -1),
    }


def _inside(params: dict[str, Any], tensors: Tensors) -> dict[str, Output]:
    for name in ("hidden", "position_ids", "input_layernorm.weight", "q_proj.weight"):
        tensors.ignore(f"in.S1.{name}", "q and k of the scoring layer are recorded")
    tensors.ignore("in.S1.k_proj.weight", "q and k of the scoring layer are recorded")
    strategy = VScan()
    assert strategy.positions == params["position_policy"]
    positions = tensors["out.S1.position_ids"]
    rows, scores, ids = [], [], []
    for b, (first, end) in enumerate(params["image_span"]):
        n = end - first
        count = min(params["counts"][0], n)
        # Lengths of padded samples are recorded only as position ids that begin again at 0.
        after = int((positions[b] > 0).sum()) + 1
        q, k = (tensors[f"in.S1.{x}"][b : b + 1, :, : after + n - count] for x in "qk")
        row = attn_rows(q[:, :, -1:], k)[:, first:end]
        signals = Signals(torch.zeros(1, n, 1), values={LastRow(16): row})
        if (n + count) % 2 == 0:  # half of the layers see n, the others as many as are kept
            inside = Inside(0, (16,), 32, (n,), images=((n,),))
            mean = Budget.of((n + count) // 2)
            assert strategy.counts(replace(signals, inside=inside), mean) == [count]
        rows.append(strategy.select(signals, count).rows[0])
        scores.append(row[0])
        ids.append(torch.arange(after))
    keep = pad_sequence(rows, True, -1)
    ours = pad_sequence(ids, True, -1)
    return {
        "out.S1.keep": keep,
        "out.S1.keep_orig": keep,
        "out.S1.scores": pad_sequence(scores, True, -1),
        "out.S1.position_ids": (ours, positions.masked_fill(ours < 0, -1)),
        "out.keep": keep,
    }
