"""What an eager, unwrapped copy of a tiny model shows inside its language model, by definition.

Each function returns per decoder layer ``[B, L]``, of which only visual tokens are compared.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from tests.families.eager import decoder_calls, inputs_of, last_flows, last_rows, model_of
from vtprune.types import DecoderNeed, LastFlow, LastRow, TextRows, Transition, VisualRows

States = dict[nn.Module, tuple[Tensor, Tensor]]  # what a module got and what it gave


def text_rows(family: str, kind: str, visual: Tensor) -> list[Tensor]:
    valid = inputs_of(family, kind)["attention_mask"].bool()
    rows = []
    for _, (*_, probabilities) in decoder_calls(family, kind):
        mean = torch.zeros(visual.shape)
        for b, seen in enumerate(visual):
            last = max(seen.nonzero().flatten().tolist(), default=-1)
            after = [i for i in range(last + 1, len(seen)) if valid[b, i]] or [len(seen) - 1]
            mean[b] = probabilities[b][:, after].mean((0, 1))
        rows.append(mean)
    return rows


def visual_rows(family: str, kind: str, visual: Tensor) -> list[Tensor]:
    rows = []
    for _, (*_, probabilities) in decoder_calls(family, kind):
        mean = torch.zeros(visual.shape)
        for b, seen in enumerate(visual):
            if seen.any():
                mean[b] = probabilities[b][:, seen].mean((0, 1))
        rows.append(mean)
    return rows


@cache
@torch.no_grad()
def _states(family: str, kind: str) -> tuple[list[Any], States]:
    """Returns the decoder layers, and what they and their norms got and gave."""
    model = model_of(family, "eager")[0]
    text = getattr(model.base_model, "language_model", None) or model.base_model.text_model
    states: States = {}
    with ExitStack() as undo:
        for layer in text.layers:
            norms = [child for name, child in layer.named_children() if "layernorm" in name]
            for module in (layer, *norms):
                hook = module.register_forward_hook(
                    lambda module, args, output: states.update({module: (args[0], output)})
                )
                undo.callback(hook.remove)
        model(**inputs_of(family, kind))
    return list(text.layers), states


def transitions(family: str, kind: str, visual: Tensor) -> list[Tensor]:
    """From the norms before both halves of a layer, and from what the residual stream gained."""
    valid = inputs_of(family, kind)["attention_mask"].bool()
    layers, states = _states(family, kind)
    found = []
    for layer in layers:
        entered, left = states[layer]
        into_attention = states[layer.input_layernorm][1]
        middle, after = states[layer.post_attention_layernorm]
        pairs = [(into_attention, middle - entered), (after, left - middle)]
        if hasattr(layer, "pre_feedforward_layernorm"):  # then outputs have norms of their own
            mlp = states[layer.pre_feedforward_layernorm][1]
            pairs = [(into_attention, middle), (mlp, states[layer.post_feedforward_layernorm][0])]
        found.append(sum(_changed(x, y, valid) for x, y in pairs))
    return found


def _changed(x: Tensor, y: Tensor, valid: Tensor) -> Tensor:
    out = torch.zeros(valid.shape)
    for b, seen in enumerate(valid):
        given, made = x[b, seen], y[b, seen]
        cosine = (given * made).sum(-1) / given.norm(dim=-1) / made.norm(dim=-1)
        weight = (1 - cosine).exp()
        out[b, seen] = made.norm(dim=-1) / given.norm(dim=-1) * weight / weight.sum()
    return out


Reference = Callable[[str, str, Tensor], list[Tensor]]
INSIDE: dict[type[DecoderNeed], Reference] = {
    LastRow: lambda family, kind, visual: last_rows(family, kind),
    LastFlow: last_flows,
    TextRows: text_rows,
    Transition: transitions,
    VisualRows: visual_rows,
}
