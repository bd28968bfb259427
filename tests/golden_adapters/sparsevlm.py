"""SparseVLM, both versions: raters, stages from recorded queries and keys, and a whole model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from tests.golden_adapters._decoder import behind, llama, mean, span, staged
from tests.golden_harness import Output, Tensors
from vtprune.engine.rows import READERS
from vtprune.engine.states import STATES
from vtprune.registry import build
from vtprune.scoring.clustering import n_kept, n_recycled
from vtprune.scoring.raters import raters
from vtprune.strategies.sparsevlm import SparseVLM
from vtprune.strategies.sparsevlm_plus import SparseVLMPlus
from vtprune.types import (
    DecoderNeed,
    EachHead,
    EachText,
    Inside,
    Likeness,
    Quantity,
    Selection,
    Signals,
    Turned,
)

Choice = tuple[Signals, Selection]


def from_golden(params: dict[str, Any], tensors: Tensors) -> dict[str, Output]:
    plus = "selected_heads" in params
    # Heads are so narrow that the divisor becomes negative within the prompt.
    options = {"heads": params["selected_heads"], "compat": True} if plus else {}
    strategy = build("sparsevlm_plus" if plus else "sparsevlm", **options)
    assert isinstance(strategy, SparseVLM)
    assert params["position_policy"].startswith(strategy.positions)
    if "in.decode_embeds" in tensors:
        return _whole_model(params, tensors)
    return _outcome(strategy, list(_stages(strategy, params, tensors)))


def _outcome(strategy: SparseVLM, stages: list[Choice]) -> dict[str, Output]:
    """Returns what is recorded of all stages; -1 = a merged token."""
    first = stages[0][0]
    alive, most = torch.arange(first.n), first.stack(EachText, EachHead).shape[3]
    ours: dict[str, Output] = {"out.raters": raters(first, most)[0].nonzero()[:, 0]}
    for number, (signals, selection) in enumerate(stages, start=1):
        of, rows = f"out.S{number}", selection.rows[0]
        kept = rows[: n_kept(signals.n, len(rows))] if strategy.recycle else rows
        ours[f"{of}.scores"] = strategy.rating(signals)[0]
        ours[f"{of}.keep"], ours[f"{of}.keep_orig"] = kept, alive[kept]
        alive = torch.cat([alive[kept], torch.full((len(rows) - len(kept),), -1)])
        if isinstance(strategy, SparseVLMPlus):
            ours[f"{of}.heads"] = strategy.best(strategy.per_head(signals))[0]
        if selection.mix is not None:
            ours[f"{of}.merged"] = selection.apply(signals.tokens)[0, len(kept) :]
            ours[f"{of}.recycled"] = selection.mix.source[0, len(kept) :]
    ours["out.keep"] = alive[None]
    return ours


def _count(strategy: SparseVLM, n: int, kept: int) -> int:
    """Returns how many tokens are left where ``kept`` of n are kept."""
    return kept + (n_recycled(n - kept)[1] if strategy.recycle else 0)


def _stages(strategy: SparseVLM, params: dict[str, Any], tensors: Tensors) -> Iterator[Choice]:
    first, end = params["image_span"]
    embeds, n = tensors["in.inputs_embeds"][None], end - first
    visual = span(params["n_total"], (first, end))
    likeness = STATES[Likeness](None, embeds, {}, visual >= 0, visual)[0, end:]
    for stage, kept in enumerate(params["k_per_stage"]):
        q, k, hidden = (
            tensors[f"in.S{stage + 1}.{name}"][None] for name in ("q", "k", "hidden_out")
        )
        ids = tensors[f"in.S{stage + 1}.position_ids"]
        visual = span(len(ids), (first, first + n))
        read: dict[Quantity, Tensor] = {}
        for need in strategy.attention(params["prune_layers_0based"][stage]):
            assert isinstance(need, DecoderNeed)
            if isinstance(need, Turned):
                embeddings = {"position_embeddings": _rotary(ids, q.shape[3], params["rope_theta"])}
                read[need] = STATES[Turned](None, hidden, embeddings, visual >= 0, visual)
            else:
                reader = READERS[type(need)](nn.Identity(), visual >= 0, visual)
                read[need] = reader._reduce(q, k, k, None)
        after = {need: value[0, first + n :] for need, value in read.items()}
        layers = tuple(layer + 1 for layer in params["prune_layers_0based"])
        inside = Inside(
            stage,
            layers,
            params["layers"],
            (end - first,),
            after=({**after, Likeness(0): likeness},),
        )
        values = {need: value[:, first : first + n] for need, value in read.items()}
        signals = Signals(hidden[:, first : first + n], values=values, inside=inside)
        left = _count(strategy, n, kept)
        yield signals, strategy.select(signals, left)
        n = left


def _rotary(ids: Tensor, width: int, theta: float) -> tuple[Tensor, Tensor]:
    angles = ids[:, None] * theta ** -(torch.arange(0, width, 2) / width)
    angles = torch.cat([angles, angles], dim=1)[None]
    return angles.cos(), angles.sin()


@dataclass(frozen=True)
class _Seen(SparseVLM):
    """Notes what it was given, and what it chose."""

    seen: list[Choice] = field(default_factory=list, hash=False)

    def select(self, signals: Signals, k: int) -> Selection:
        self.seen.append((signals, super().select(signals, k)))
        return self.seen[-1][1]


def _whole_model(params: dict[str, Any], tensors: Tensors) -> dict[str, Output]:
    first, end = params["image_span"]
    layers = tuple(layer + 1 for layer in params["prune_layers_0based"])
    counts, n = [], end - first
    for kept in params["k_per_stage"]:
        counts.append(_count(SparseVLM(), counts[-1] if counts else n, kept))
    ratios = tuple(count / n for count in counts)
    strategy = _Seen(ratios=ratios, layers=layers)
    model = llama(params, tensors)
    cache = DynamicCache(config=model.config)
    visual = span(params["n_total"], (first, end))
    with staged(model, strategy, mean(ratios, layers, params["layers"]), visual) as decoding:
        out = model(inputs_embeds=tensors["in.inputs_embeds"][None], past_key_values=cache)
        lengths = [cache.get_seq_length(i) for i in range(len(model.layers))]
        steps = tensors["in.decode_embeds"][None].split(1, dim=1)
        hidden = [
            model(inputs_embeds=step, past_key_values=cache).last_hidden_state for step in steps
        ]
    ids = [
        [params["n_total"] + step - behind(decoding, layer) for layer in range(len(lengths))]
        for step in range(len(steps))
    ]
    return {
        **_outcome(strategy, strategy.seen),
        "out.last_hidden_state": out.last_hidden_state[0],
        "out.cache_lens": torch.tensor(lengths),
        "out.decode_hidden": torch.cat(hidden, dim=1)[0],
        "out.decode_position_ids": torch.tensor(ids),
    }
