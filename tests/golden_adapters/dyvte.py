"""DyVTE: the gates' inputs and logits, and what is left of the model after the exit."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import DynamicCache

from tests.golden_adapters._decoder import llama, span, staged
from tests.golden_harness import Output, Tensors
from vtprune.engine.states import STATES
from vtprune.gates import load
from vtprune.registry import build
from vtprune.types import TextState

PREFIX = "in.gates."


def from_golden(params: dict[str, Any], tensors: Tensors) -> dict[str, Output]:
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "gates.safetensors")
        names = [name for name in tensors if name.startswith(PREFIX)]
        save_file({name.removeprefix("in."): tensors[name] for name in names}, path)
        return _of_gates(path, params, tensors)


def _of_gates(path: str, params: dict[str, Any], tensors: Tensors) -> dict[str, Output]:
    model, depth = llama(params, tensors), params["layers"]
    gates = load(path)
    strategy = build("dyvte", gates=path, threshold=0.0)
    assert strategy.positions == params["position_policy"]
    assert params["exit_rule"] == "logits[1] > logits[0]"
    visual = span(params["n_total"], tuple(params["image_span"]))
    cache = DynamicCache(config=model.config)
    given: list[Any] = []
    steps = "in.decode_embeds" in tensors
    with staged(model, strategy, 1.0, visual) as decoding:
        hook = model.layers[-1].register_forward_hook(lambda module, args, out: given.append(out))
        out = model(inputs_embeds=tensors["in.inputs_embeds"][None], past_key_values=cache)
        hook.remove()
        lengths = [cache.get_seq_length(i) for i in range(depth)]
        rows = tensors["in.decode_embeds"][None].split(1, dim=1) if steps else ()
        hidden = [
            model(inputs_embeds=row, past_key_values=cache).last_hidden_state[0] for row in rows
        ]
    gone = next(iter(decoding.cuts), depth + 1) - 1  # the layer after which they left
    states = {number: decoding.rows[TextState(number + 1)] for number in range(depth - 1)}
    if not decoding.cuts:  # their last gate is asked too, behind which there is no layer
        states[depth - 1] = STATES[TextState](model, given[0], {}, visual >= 0, visual)
    seen = {number: state for number, state in states.items() if number <= gone}
    logits = [gates(state, number + 1) for number, state in seen.items()]
    ours: dict[str, Output] = {f"out.L{number}.feature": state[0] for number, state in seen.items()}
    ours["out.gate_logits"] = torch.cat(logits)
    ours["out.exit_layer"] = torch.tensor([gone if decoding.cuts else -1])
    ours["out.last_hidden_state"] = out.last_hidden_state[0]
    ours["out.cache_lens"] = torch.tensor(lengths)
    if steps:
        ours["out.decode_hidden"] = torch.cat(hidden)
    return ours
