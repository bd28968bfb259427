"""How much the language model computes for a prompt: by the published formula, and by its parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from vtprune.engine.decoding import Decoding
from vtprune.rules import RowRule


def published(layers: Sequence[Any], rules: Mapping[int, RowRule], decoding: Decoding) -> float:
    """Returns the share of what whole layers would compute for visual tokens, by the formula.

    For all that entered the language model; what left it before a layer costs nothing there.
    """
    config = layers[0].self_attn.config
    width, ffn = config.hidden_size, config.intermediate_size
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    made = full = 0.0
    for number in range(len(layers)):
        cut, rule = decoding.cut(number), rules.get(number, RowRule())
        visual = decoding.visual if cut is None else cut.of(decoding.visual)
        cut = decoding.chosen.get(number)
        chosen = None if cut is None else cut.of(decoding.visual.to(cut.index.device)).sum(1)
        for b, n in enumerate(visual.sum(1).tolist()):
            made += rule.macs(n, width, ffn, heads, None if chosen is None else int(chosen[b]))
        for n in decoding.visual.sum(1).tolist():
            full += RowRule().macs(n, width, ffn)
    return made / full if full else 1.0


def whole(layers: Sequence[Any], decoding: Decoding) -> int:
    """Returns the multiply-accumulates of whole layers on all rows, padding among them."""
    total = 0
    for number, layer in enumerate(layers):
        cut, attention = decoding.cut(number), layer.self_attn
        batch, n = (decoding.valid if cut is None else cut.index).shape
        heads = attention.config.num_attention_heads
        width = getattr(attention, "head_dim", attention.config.hidden_size // heads)
        total += batch * n * (macs_per_row(layer, attention.config) + 2 * n * heads * width)
    return total


def macs_per_row(module: nn.Module, config: Any) -> int:
    """Returns the multiply-accumulates of the module's matrices for one row.

    Of stacked experts a row meets as many as the configuration says.
    """
    weights = [weight for weight in module.parameters() if weight.ndim > 1]
    met = getattr(config, "num_experts_per_tok", None) or 1
    return sum(w.numel() if w.ndim == 2 else w.numel() // len(w) * met for w in weights)
