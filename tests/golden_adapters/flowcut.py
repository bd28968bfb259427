"""FlowCut: a CLIP encoder of recorded weights, run with the stages between its blocks."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig
from transformers.models.clip.modeling_clip import CLIPEncoder

from tests.golden_harness import Output, Tensors
from vtprune.engine import tap
from vtprune.engine.blocks import Blocks
from vtprune.engine.signals import Step
from vtprune.engine.tower import Climb
from vtprune.registry import build
from vtprune.types import Budget, Facts, TowerNeed

PREFIX = "in.w."


def from_golden(params: dict[str, Any], tensors: Tensors) -> dict[str, Output]:
    encoder, states = _encoder(params, tensors), tensors["in.x"]
    last, batch, width = params["select_layer"], len(states), states.shape[1] - 1
    facts = Facts(params["blocks"], last, True, Facts.signals_of(cls_row=True))
    strategy = build("flowcut", compat=batch > 1)
    budget = Budget.of(params["tokens"])
    steps = [Step(strategy, stage, budget, "renumber") for stage in strategy.plan(facts)]
    wanted: dict[nn.Module, list[TowerNeed]] = {}
    for need in steps[-1].stage.tower_needs:
        attention: Any = encoder.layers[need.layer].self_attn
        wanted.setdefault(attention, []).append(need)
    lengths: list[int] = []

    def call(block: nn.Module, states: Tensor, mask: Tensor | None = None) -> Tensor:
        lengths.append(states.shape[1] - 1)
        return block(states, mask)

    first = steps[0].stage.layer
    assert first is not None
    with ExitStack() as undo:
        tap.install("sdpa")
        undo.callback(tap.uninstall, "sdpa")
        undo.enter_context(torch.no_grad())
        blocks = Blocks(list(encoder.layers)[: last + 1], call, tap.Tap(wanted, 1), 1)
        undo.enter_context(tap.reading(blocks.tap))
        for block in blocks.modules[:first]:
            states = call(block, states)
        rows = range(batch)
        spots = [torch.arange(width)] * batch
        climb = Climb(
            *(blocks, steps, states, spots, dict.fromkeys(rows, [budget] * len(steps))),
            {b: b for b in rows},
        )
        kept = torch.cat([selection.rows for selection in climb.chosen()])
        features = climb.features()
        alive = torch.stack([x[1:][row] for x, row in zip(features, kept, strict=True)])
        call(encoder.layers[-1], torch.cat([features[:, :1], alive], dim=1))
    return {
        "out.keep": kept,
        "out.tokens": alive,
        "out.cls": features[:, :1],
        "out.length_after_block": torch.tensor([*lengths[1:], lengths[-1]]),
    }


def _encoder(params: Mapping[str, Any], tensors: Tensors) -> CLIPEncoder:
    config: Any = CLIPVisionConfig(
        hidden_size=params["hidden"],
        intermediate_size=params["mlp"],
        num_hidden_layers=params["blocks"],
        num_attention_heads=params["heads"],
        layer_norm_eps=params["layernorm_eps"],
        hidden_act="quick_gelu",
    )
    config._attn_implementation = "sdpa"
    encoder = CLIPEncoder(config)
    names = [name for name in tensors if name.startswith(PREFIX)]
    encoder.load_state_dict({name.removeprefix(PREFIX): tensors[name] for name in names})
    return encoder.eval()
