"""ToMe: one merge of recorded states, and a ViT of recorded weights with a merge in every block."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, layer_norm, linear, one_hot
from transformers import CLIPVisionConfig
from transformers.models.clip.modeling_clip import CLIPEncoder

from tests.golden_adapters._merge import Merge, into_of, rows_of
from tests.golden_harness import Output, Tensors
from vtprune.engine import tap
from vtprune.engine.blocks import Blocks
from vtprune.engine.signals import Step
from vtprune.engine.tower import Climb
from vtprune.strategies.tome import ToMe
from vtprune.types import Budget, Facts, Selection, Signals, TowerNeed

EPS = 1e-6


def from_golden(params: dict[str, Any], tensors: Tensors) -> dict[str, Output]:
    if "in.image" in tensors:
        return _vit(params, tensors)
    merge = Merge(tensors, params["prefix_tokens"])
    return merge.run(ToMe(), merge.signals.n - params["r_effective"])


def _vit(params: dict[str, Any], tensors: Tensors) -> dict[str, Output]:
    state = {name.removeprefix("in.state."): tensors[name] for name in tensors if "state" in name}
    stem = conv2d(
        tensors["in.image"],
        state["patch_embed.proj.weight"],
        state["patch_embed.proj.bias"],
        stride=params["patch_size"],
    )
    cls = state["cls_token"].expand(len(stem), -1, -1)
    states = torch.cat([cls, stem.flatten(2).mT], dim=1) + state["pos_embed"]
    encoder = _encoder(params, state)
    with torch.no_grad():
        plain = _logits(state, encoder(inputs_embeds=states).last_hidden_state)
        climb, merges = _climb(params, encoder, states)
    tiles = list(climb.tiles.values())
    into = torch.arange(states.shape[1] - 1).expand(len(states), -1)
    for selection in merges:
        into = into_of(selection).gather(1, into)
    into = torch.cat([into.new_zeros(len(into), 1), into + 1], dim=1)
    source = one_hot(into, params["tokens_after"]).mT.to(torch.uint8)
    size = torch.stack([torch.cat([torch.ones(1), tile.sizes]) for tile in tiles])[..., None]
    ours, recorded = (x.argmax(-1).argsort(dim=1) for x in (source, tensors["out.source"]))
    return {
        "out.logits_unreduced": plain,
        "out.logits": _logits(state, torch.stack([tile.states for tile in tiles])),
        "out.size": (rows_of(size, ours), rows_of(tensors["out.size"], recorded)),
        "out.source": (rows_of(source, ours), rows_of(tensors["out.source"], recorded)),
    }


def _logits(state: dict[str, Tensor], states: Tensor) -> Tensor:
    norm = layer_norm(
        states[:, 0], states.shape[-1:], state["norm.weight"], state["norm.bias"], EPS
    )
    return linear(norm, state["head.weight"], state["head.bias"])


def _climb(
    params: dict[str, Any], encoder: CLIPEncoder, states: Tensor
) -> tuple[Climb, list[Selection]]:
    """The way through all blocks, and what each merged."""
    merges: list[Selection] = []
    depth, n = params["depth"], states.shape[1] - 1

    class Noted(ToMe):
        def counts(self, signals: Signals, budget: Budget) -> list[int]:
            assert signals.inside is not None
            r = params["r_per_block"][signals.inside.stage]
            return [signals.n - min(r, signals.n // 2)] * len(signals.tokens)

        def select(self, signals: Signals, k: int) -> Selection:
            merges.append(super().select(signals, k))
            return merges[-1]

    strategy = Noted(prop_attn=params["prop_attn"])
    budget = Budget.of(params["tokens_after"] - 1)
    stages = strategy.plan(Facts(depth, depth - 1, True, Facts.signals_of(cls_row=True)))
    steps = [Step(strategy, stage, budget, "renumber") for stage in stages]
    wanted: dict[nn.Module, list[TowerNeed]] = {}
    for layer, stage in zip(encoder.layers, stages, strict=True):
        attention: Any = layer.self_attn
        wanted[attention] = list(stage.tower_needs)
    rows = range(len(states))
    with ExitStack() as undo:
        tap.install("sdpa")
        undo.callback(tap.uninstall, "sdpa")
        blocks = Blocks(list(encoder.layers), nn.Module.__call__, tap.Tap(wanted, 1), 1)
        undo.enter_context(tap.reading(blocks.tap))
        climb = Climb(
            blocks,
            steps,
            states,
            [torch.arange(n)] * len(states),
            dict.fromkeys(rows, [budget] * len(steps)),
            dict.fromkeys(rows, 0),
        )
    return climb, merges


def _encoder(params: dict[str, Any], state: dict[str, Tensor]) -> CLIPEncoder:
    """An encoder of transformers with the weights of one of timm."""
    config: Any = CLIPVisionConfig(
        hidden_size=params["embed_dim"],
        intermediate_size=round(params["embed_dim"] * params["mlp_ratio"]),
        num_hidden_layers=params["depth"],
        num_attention_heads=params["num_heads"],
        layer_norm_eps=EPS,
        hidden_act="gelu",
    )
    config._attn_implementation = "sdpa"
    encoder = CLIPEncoder(config)
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        if not name.startswith("blocks."):
            continue
        name = name.replace("blocks.", "layers.").replace("norm", "layer_norm")
        if ".qkv." in name:
            for part, piece in zip("qkv", value.chunk(3), strict=True):
                renamed[name.replace("attn.qkv", f"self_attn.{part}_proj")] = piece
        else:
            renamed[name.replace("attn.proj", "self_attn.out_proj")] = value
    encoder.load_state_dict(renamed)
    return encoder.eval()
