"""ShortV: frozen layers in a whole model, one attention call, contributions of layers."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

from tests.golden_adapters._decoder import PREFIX, decoder, llama, span
from tests.golden_adapters._rules import ruled, watching
from tests.golden_harness import Output, Tensors
from vtprune.engine import tap
from vtprune.engine.computing import Computing
from vtprune.engine.decoding import Decoding
from vtprune.engine.split import Split
from vtprune.registry import build
from vtprune.scoring.contribution import contribution, order_of
from vtprune.types import RowRule


def from_golden(params: dict[str, Any], tensors: Tensors) -> dict[str, Output]:
    assert build("shortv").positions == params["position_policy"]
    visual = span(params["n_total"], tuple(params["image_span"]))
    if "replaced_layers_0based" in params:
        return _two_layers(params, tensors, visual)
    if "layers" in params:
        return _contributions(params, tensors, visual)
    return _one_call(params, tensors, visual.expand(params["batch"], -1))


def rules(layers: int, *replaced: int) -> dict[int, RowRule]:
    stages = build("shortv", layers=replaced).plan(decoder(layers))
    return {stage.layer or 0: stage.rule for stage in stages if isinstance(stage.rule, RowRule)}


def _two_layers(params: Mapping[str, Any], tensors: Tensors, visual: Tensor) -> dict[str, Output]:
    model, replaced = llama(params, tensors), params["replaced_layers_0based"]
    parts: dict[str, nn.Module] = {}
    for number in replaced:
        layer: Any = model.layers[number]
        parts |= {f"L{number}": layer, f"attention {number}": layer.self_attn}
    cache = DynamicCache(config=model.config)
    with ruled(model, rules(params["layers"], *replaced), visual):
        with watching(parts) as seen:
            out = model(inputs_embeds=tensors["in.inputs_embeds"], past_key_values=cache)
        lengths = [cache.get_seq_length(number) for number in range(params["layers"])]
        steps = [
            model(inputs_embeds=step[:, None], past_key_values=cache).last_hidden_state
            for step in tensors["in.decode_embeds"].unbind(1)
        ]
    ours: dict[str, Output] = {
        "out.last_hidden_state": out.last_hidden_state,
        "out.cache_lens": torch.tensor(lengths),
        "out.decode_hidden": torch.cat(steps, dim=1),
    }
    for number in replaced:
        entered, ours[f"out.L{number}.hidden"] = seen[f"L{number}"]
        normed, attended = seen[f"attention {number}"]
        torch.testing.assert_close(entered, tensors[f"in.L{number}.hidden"])
        torch.testing.assert_close(normed, tensors[f"in.L{number}.attn_in"])
        ours[f"out.L{number}.attn"] = attended[:, ~visual[0]]
    return ours


def _contributions(
    params: Mapping[str, Any], tensors: Tensors, visual: Tensor
) -> dict[str, Output]:
    head = f"{PREFIX}lm_head.weight"
    model = llama(params, {name: tensors[name] for name in tensors if name != head})

    def last(*replaced: int) -> Tensor:
        found = rules(params["layers"], *replaced) if replaced else {}
        with ruled(model, found, visual):
            out = model(inputs_embeds=tensors["in.inputs_embeds"])
        return out.last_hidden_state[:, -1] @ tensors[head].T

    whole = last()
    made = [contribution(last(number), whole).mean() for number in range(params["layers"])]
    return {
        "out.logits_last": whole,
        "out.LC": torch.stack(made),
        "out.replace_order": torch.tensor(order_of(torch.stack(made))),
    }


def _one_call(params: Mapping[str, Any], tensors: Tensors, visual: Tensor) -> dict[str, Output]:
    for name in ("in.q", "in.k", "in.v"):
        tensors.ignore(name, "made anew from in.hidden by the recorded projections")
    config = LlamaConfig(
        hidden_size=params["hidden"],
        num_attention_heads=params["heads"],
        rope_parameters={"rope_type": "default", "rope_theta": params["rope_theta"]},
    )
    config._attn_implementation = "sdpa"
    attention = LlamaAttention(config, 0)
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    attention.load_state_dict({f"{n}.weight": tensors[f"in.{n}.weight"] for n in names})
    hidden, split = tensors["in.hidden"], Split.of(visual)
    decoding = Decoding(torch.ones_like(visual), visual, visual, [])
    layer = SimpleNamespace(self_attn=attention, mlp=nn.Linear(1, 1))
    computing = Computing([layer], {0: RowRule(attend="none")}, lambda: decoding)
    positions = torch.arange(params["n_total"])[None]
    with ExitStack() as undo, torch.no_grad(), tap.changing(computing):
        tap.install("sdpa")
        undo.callback(tap.uninstall, "sdpa")
        computing.install(undo)
        with watching({"o_proj": attention.o_proj}) as seen:
            out, _ = attention(hidden, LlamaRotaryEmbedding(config)(hidden, positions), None)
    n = params["n_total"]
    seen_by = split.mask(torch.ones(n, n, dtype=torch.long).tril()[None, None])
    shape = (len(hidden), -1, params["hidden"])
    return {
        "out.attn": seen["o_proj"][0].view(shape),
        "out.attn_projected": out[~visual].view(shape),
        "out.mask": seen_by[0, 0],
    }
