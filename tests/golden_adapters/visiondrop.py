"""VisionDrop: the encoder stage, stages from recorded queries and keys, and a whole model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

import vtprune
from tests.golden_adapters._decoder import behind, llama, mean, span, staged
from tests.golden_harness import Output, Tensors
from vtprune.engine.rows import READERS
from vtprune.kernels.attn_rows import attn_rows
from vtprune.registry import build
from vtprune.strategies.visiondrop import VisionDrop
from vtprune.types import (
    ClsRow,
    Inside,
    Keys,
    LayerKeys,
    Quantity,
    Selection,
    Signals,
    VisualRows,
)

UNREAD = ("position_ids", "input_layernorm.weight", "q_proj.weight", "k_proj.weight")


def from_golden(params: dict[str, Any], tensors: Tensors) -> dict[str, Output]:
    if params["stage"] == "encoder":
        return _encoder(params, tensors)
    if "in.inputs_embeds" in tensors:
        return _whole_model(params, tensors)
    return _stages(params, tensors)


def _encoder(params: dict[str, Any], tensors: Tensors) -> dict[str, Output]:
    q, k, hidden = (tensors[f"in.{name}"] for name in ("q", "k", "hidden"))
    n_top, n_merged = params["dominant_including_cls"], params["contextual"]
    row = attn_rows(q[:, :, :1], k)[:, 1:]
    values: dict[Quantity, Tensor] = {ClsRow(22): row, Keys(22): k.mean(1)[:, 1:]}
    signals = Signals(hidden[:, 1:], values=values, n_prefix=1)
    strategy = build("visiondrop", contextual=(n_merged, 0, 0, 0))
    selection = vtprune.select(strategy, keep=n_top + n_merged, signals=signals)
    return {
        "out.keep": selection.rows[:, :n_top] + 1,
        "out.tokens": selection.apply(torch.cat([hidden[:, 1:], hidden[:, :1]], dim=1)),
        "out.scores": row * params["heads"],  # the authors add heads up
    }


def _stages(params: dict[str, Any], tensors: Tensors) -> dict[str, Output]:
    layers, counts = tuple(params["prune_layers_1based"]), params["dominant_contextual_per_stage"]
    first, end = params["image_span"][0]
    strategy = build("visiondrop")  # the counts are those of the scripts
    assert strategy.positions == params["position_policy"]
    ours: dict[str, Output] = {}
    for stage, ((n_top, n_merged), layer) in enumerate(zip(counts, layers, strict=True)):
        for name in UNREAD:
            tensors.ignore(f"in.S{stage + 1}.{name}", "q and k of the scoring layer are recorded")
        q, k, hidden = (tensors[f"in.S{stage + 1}.{name}"] for name in ("q", "k", "hidden"))
        visual = span(hidden.shape[1], (first, end))
        values: dict[Quantity, Tensor] = {
            kind(layer): READERS[kind](nn.Identity(), visual >= 0, visual)._reduce(q, k, k, None)[
                :, first:end
            ]
            for kind in (VisualRows, LayerKeys)
        }
        inside = Inside(stage, layers, params["layers"], (48,), images=((576,),))
        signals = Signals(hidden[:, first:end], values=values, inside=inside)
        selection = vtprune.select(strategy, keep=n_top + n_merged, signals=signals)
        ours |= _of_stage(stage + 1, values[VisualRows(layer)], selection, n_top, signals.tokens)
        end = first + n_top + n_merged
        left = hidden.shape[1] - signals.n + n_top + n_merged
        ours[f"out.S{stage + 1}.position_ids"] = torch.arange(left)[None]
    return ours


def _of_stage(
    number: int, scores: Tensor, selection: Selection, n_top: int, tokens: Tensor
) -> dict[str, Output]:
    return {
        f"out.S{number}.scores": scores,
        f"out.S{number}.keep": selection.rows[:, :n_top],
        f"out.S{number}.contextual": selection.apply(tokens)[:, n_top:],
    }


@dataclass(frozen=True)
class _Seen(VisionDrop):
    """Notes what it was given, and what it chose."""

    seen: list[tuple[Signals, Selection]] = field(default_factory=list, hash=False)

    def select(self, signals: Signals, k: int) -> Selection:
        self.seen.append((signals, super().select(signals, k)))
        return self.seen[-1][1]


def _whole_model(params: dict[str, Any], tensors: Tensors) -> dict[str, Output]:
    layers, counts = params["prune_layers_1based"], params["dominant_contextual_per_stage"]
    first, end = params["image_span"][0]
    ratios = [sum(pair) / (end - first) for pair in counts]
    merged = (0, *(n for _, n in counts))
    strategy = _Seen(ratios=(1.0, *ratios), contextual=merged)
    visual = span(params["n_total"], (first, end))
    model = llama(params, tensors)
    cache = DynamicCache(config=model.config)
    ours: dict[str, Output] = {}
    with staged(model, strategy, mean(ratios, layers, params["layers"]), visual) as decoding:
        out = model(inputs_embeds=tensors["in.inputs_embeds"], past_key_values=cache)
        lengths = [cache.get_seq_length(i) for i in range(len(model.layers))]
        steps = tensors["in.decode_embeds"].split(1, dim=1)
        hidden = [
            model(inputs_embeds=step, past_key_values=cache).last_hidden_state for step in steps
        ]
    assert sorted(decoding.cuts) == layers
    for number, (signals, selection) in enumerate(strategy.seen, start=1):
        layer, (n_top, _) = layers[number - 1], counts[number - 1]
        scores = signals.values[VisualRows(layer)]
        ours |= _of_stage(number, scores, selection, n_top, signals.tokens)
        cut = decoding.cuts[layer]
        assert cut.moved is not None
        ours[f"out.S{number}.position_ids"] = cut.index - cut.moved
    ours["out.last_hidden_state"] = out.last_hidden_state
    ours["out.cache_lens"] = torch.tensor(lengths)
    ours["out.decode_hidden"] = torch.cat(hidden, dim=1)
    ours["out.decode_position_ids"] = torch.tensor(
        [
            [[params["n_total"] + step - behind(decoding, layer)] for layer in range(len(lengths))]
            for step in range(len(steps))
        ]
    )
    return ours
