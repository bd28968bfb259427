"""YOPO: window, heads, sliced MLPs and dropped layers in a whole model, and its decode steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from tests.golden_adapters._decoder import decoder, llama, span
from tests.golden_adapters._rules import ruled, watching
from tests.golden_harness import Output, Tensors
from vtprune.engine.places import near
from vtprune.registry import build
from vtprune.types import RowRule


def from_golden(params: dict[str, Any], tensors: Tensors) -> dict[str, Output]:
    masks = tensors["in.headmask"].bool()
    strategy = build(
        "yopo",
        window=params["window"],
        layercut=params["layercut"],
        mlp_ratio=params["mlpcut_ratio"],
        heads=tuple(tuple(mask.nonzero()[:, 0].tolist()) for mask in masks),
    )
    stages = strategy.plan(decoder(params["layers"]))
    rules = {stage.layer or 0: stage.rule for stage in stages if isinstance(stage.rule, RowRule)}
    visual = span(params["n_total"], tuple(params["image_span"]))
    where = _places(visual, *params["grid"])
    model = llama(params, tensors)
    layers: Any = model.layers
    parts = {str(number): layer.self_attn.o_proj for number, layer in enumerate(layers)}
    ours: dict[str, Output] = {}
    cache = DynamicCache(config=model.config)
    with ruled(model, rules, visual, where):
        with watching(parts) as seen:
            out = model(inputs_embeds=tensors["in.inputs_embeds"][None], past_key_values=cache)
        if "in.decode_embeds" in tensors:
            steps = [
                model(inputs_embeds=step[None, None], past_key_values=cache).last_hidden_state
                for step in tensors["in.decode_embeds"]
            ]
            ours["out.decode_hidden"] = torch.cat(steps, dim=1)[0]
    close = near(where, rules[0].radius)[0]
    ours["out.last_hidden_state"] = out.last_hidden_state[0]
    ours["out.window_mask"] = close[visual[0]][:, visual[0]].long()
    for name in [name for name in tensors if name.endswith(".probs")]:
        number = int(name.removeprefix("out.L").removesuffix(".probs"))
        q, k = (tensors[f"in.L{number}.{kind}"] for kind in "qk")
        tensors.ignore(f"in.L{number}.v", "made anew by the model, whose output is compared")
        ours[name] = probabilities(rules[number], q, k, close, visual[0])
        ours[f"out.L{number}.attn"] = seen[str(number)][0][0]
    return ours


def probabilities(rule: RowRule, q: Tensor, k: Tensor, close: Tensor, visual: Tensor) -> Tensor:
    """What the recorded queries attend to, ``[H, L, L]``: the window, then what values are read."""
    seen = torch.ones(len(visual), len(visual), dtype=torch.bool).tril()
    seen = torch.where(visual[:, None] & visual, close, seen)
    found = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~seen, -torch.inf).softmax(-1)
    dropped = torch.ones(len(q), dtype=torch.bool)
    dropped[list(rule.heads or ())] = False
    unread = visual & (dropped[:, None, None] | (not rule.read))
    return found.masked_fill(unread, 0.0)


def _places(visual: Tensor, height: int, width: int) -> Tensor:
    where = torch.full((*visual.shape, 4), -1.0)
    spots = torch.arange(height * width)
    grid = [spots * 0, spots * 0, spots // width, spots % width]
    where[visual] = torch.stack(grid, dim=1).float()
    return where
