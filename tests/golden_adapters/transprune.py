"""TransPrune: every stage from recorded inputs and outputs of the layers, and a whole model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from tests.golden_adapters._decoder import behind, decoder, llama, mean, span, staged
from tests.golden_harness import Output, Tensors
from vtprune.engine.cuts import Cut
from vtprune.engine.rows import Texts
from vtprune.engine.transition import transition
from vtprune.registry import build
from vtprune.types import Budget, Inside, Quantity, Signals, Strategy, TextRows, Transition


def from_golden(params: dict[str, Any], tensors: Tensors) -> dict[str, Output]:
    layers = tuple(params["prune_layers_1based"])  # after the n-th layer is before layer n
    strategy = build("transprune", layers=layers, ratios=tuple(params["ratios"]))
    assert strategy.positions == params["position_policy"]
    keep = mean(params["ratios"], layers, params["L"])
    if "in.inputs_embeds" in tensors:
        return _whole_model({**params, "layers": params["L"]}, strategy, keep, tensors)
    ours: dict[str, Output] = {}
    first, alive = params["n_sys"], torch.arange(params["n_img"])
    moved: dict[Quantity, Tensor] = {}  # [n_img], of any token at its own place
    start = params["accumulate_layers_1based"][0]
    for stage, layer in enumerate(layers, start=1):
        for number in range(start, layer + 1):
            found = _ttv(number, tensors)
            ours[f"out.L{number}.ttv"] = found
            moved[Transition(number - 1)] = torch.zeros(params["n_img"]).index_copy(
                0, alive, found[first : first + len(alive)]
            )
        start = layer + 1
        row = _instruction(stage, first, len(alive), tensors)
        inside = Inside(stage - 1, layers, params["L"], (params["n_img"],))
        values = {need: value[None, alive] for need, value in moved.items()}
        values[TextRows(layer)] = row[None]
        signals = Signals(torch.zeros(1, len(alive), 1), values=values, inside=inside)
        (count,) = strategy.counts(signals, Budget.of(keep))
        (kept,) = strategy.select(signals, count).rows
        alive = alive[kept]
        ours |= _outcome(stage, strategy, signals, kept, alive)
    ours["out.keep"] = alive[None]
    return ours


def _outcome(
    stage: int, strategy: Strategy, signals: Signals, kept: Tensor, alive: Tensor
) -> dict[str, Output]:
    return {
        f"out.S{stage}.score": 2 * strategy.score(signals)[0],  # theirs is the sum of both halves
        f"out.S{stage}.keep": kept,
        f"out.S{stage}.keep_orig": alive,
    }


def _ttv(number: int, tensors: Tensors) -> Tensor:
    halves = [
        (tensors[f"in.L{number}.{half}_in"][None], tensors[f"in.L{number}.{half}_out"][None])
        for half in ("attn", "ffn")
    ]
    valid = torch.ones(halves[0][0].shape[:2], dtype=torch.bool)
    attention, mlp = (transition(x, y, valid)[0] for x, y in halves)
    return attention + mlp


def _instruction(stage: int, first: int, n: int, tensors: Tensors) -> Tensor:
    q, k = tensors[f"in.S{stage}.q"][None], tensors[f"in.S{stage}.k"][None]
    visual = span(q.shape[2], (first, first + n))
    module = nn.Module()
    rows = Texts(module, torch.ones_like(visual), visual)
    with rows.only():
        rows.read(module, q, k, None, None)
    return rows.value()[visual]


def _whole_model(
    params: dict[str, Any], strategy: Strategy, keep: float, tensors: Tensors
) -> dict[str, Output]:
    model = llama(params, tensors)
    visual = span(params["n_total"], tuple(params["image_span"]))
    cache = DynamicCache(config=model.config)
    with staged(model, strategy, keep, visual) as decoding:
        out = model(inputs_embeds=tensors["in.inputs_embeds"][None], past_key_values=cache)
        lengths = [cache.get_seq_length(i) for i in range(params["L"])]
        steps = tensors["in.decode_embeds"][None].split(1, dim=1)
        hidden = [
            model(inputs_embeds=step, past_key_values=cache).last_hidden_state[0] for step in steps
        ]
    ours: dict[str, Output] = {}
    whole = Cut.whole(torch.ones_like(visual))
    for number in params["accumulate_layers_1based"]:
        cut = decoding.cut(number - 1) or whole
        ours[f"out.L{number}.ttv"] = decoding.rows[Transition(number - 1)][0, cut.index[0]]
    before, first = whole.index, params["n_sys"]
    stages = strategy.plan(decoder(params["L"]))
    for stage, layer in enumerate(params["prune_layers_1based"], start=1):
        columns, cut = before[visual.gather(1, before)], decoding.cuts[layer]
        needs = next(s.needs for s in stages if s.layer == layer)
        values: dict[Quantity, Tensor] = {
            n: x[:, columns] for n, x in decoding.rows.items() if n in needs
        }
        signals = Signals(torch.zeros(1, len(columns), 1), values=values)
        alive = cut.index[visual.gather(1, cut.index)]
        kept = torch.searchsorted(columns, alive)
        ours |= _outcome(stage, strategy, signals, kept, alive - first)
        before = cut.index
    ours["out.keep"] = before[visual.gather(1, before)][None] - first
    ours["out.last_hidden_state"] = out.last_hidden_state[0]
    ours["out.cache_lens"] = torch.tensor(lengths)
    ours["out.decode_hidden"] = torch.cat(hidden)
    ours["out.decode_position_ids"] = torch.tensor(
        [
            [params["n_total"] + step - behind(decoding, layer) for layer in range(params["L"])]
            for step in range(len(steps))
        ]
    )
    return ours
