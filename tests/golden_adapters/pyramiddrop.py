"""PyramidDrop: every stage from recorded queries and keys, and a whole model with decoding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from tests.golden_adapters._decoder import behind, llama, mean, span, staged
from tests.golden_harness import Output, Tensors
from vtprune.engine.cuts import Cut
from vtprune.kernels.attn_rows import attn_rows
from vtprune.registry import build
from vtprune.types import Budget, Inside, LastRow, Signals, Strategy

UNREAD = ("hidden", "position_ids", "input_layernorm.weight", "q_proj.weight", "k_proj.weight")


def from_golden(params: dict[str, Any], tensors: Tensors) -> dict[str, Output]:
    layers = tuple(params["prune_layers_1based"])  # after the n-th layer is before layer n
    strategy = build("pyramiddrop", layers=layers)
    assert strategy.positions == params["position_policy"]
    keep = mean(params["ratios_of_original"], layers, params["layers"])
    if "in.inputs_embeds" in tensors:
        return _whole_model(strategy, keep, params, tensors)
    # The lengths of padded samples are recorded only as position ids that begin again at 0.
    after = (tensors["out.S1.position_ids"] > 0).sum(1) + 1
    samples = [
        _Sample(strategy, keep, image, int(n), params)
        for image, n in zip(params["image_span"], after, strict=True)
    ]
    ours: dict[str, Output] = {}
    for stage in range(1, len(layers) + 1):
        for name in UNREAD:
            tensors.ignore(f"in.S{stage}.{name}", "q and k of the scoring layer are recorded")
        q, k = tensors[f"in.S{stage}.q"], tensors[f"in.S{stage}.k"]
        found = [s.stage(stage - 1, q[b], k[b]) for b, s in enumerate(samples)]
        for name, rows in zip(
            ("keep", "scores", "keep_orig"), zip(*found, strict=True), strict=True
        ):
            ours[f"out.S{stage}.{name}"] = pad_sequence(list(rows), True, -1)
        ids = pad_sequence([torch.arange(s.length) for s in samples], True, -1)
        recorded = tensors[f"out.S{stage}.position_ids"]  # of padding they mean nothing
        ours[f"out.S{stage}.position_ids"] = ids, recorded.masked_fill(ids < 0, -1)
    ours["out.keep"] = pad_sequence([s.alive for s in samples], True, -1)
    return ours


class _Sample:
    """One sample on its way through the stages; ``alive`` are its tokens, ``length`` all."""

    def __init__(
        self,
        strategy: Strategy,
        keep: float,
        image: list[int],
        after: int,
        params: dict[str, Any],
    ) -> None:
        self.strategy, self.budget = strategy, Budget.of(keep)
        self.first, self.n = image[0], image[1] - image[0]
        self.layers, self.depth = params["prune_layers_1based"], params["layers"]
        self.alive = torch.arange(self.n)
        self.length = after + self.n - int(self.n * params["ratios_of_original"][0])

    def stage(self, number: int, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns what is kept, the scores, and what is kept of the original image."""
        q, k = q[None, :, : self.length], k[None, :, : self.length]
        n = len(self.alive)
        row = attn_rows(q[:, :, -1:], k)[:, self.first : self.first + n]
        inside = Inside(number, tuple(self.layers), self.depth, (self.n,))
        layer = self.layers[number]
        signals = Signals(torch.zeros(1, n, 1), values={LastRow(layer): row}, inside=inside)
        (count,) = self.strategy.counts(signals, self.budget)
        (keep,) = self.strategy.select(signals, count).rows
        self.alive = self.alive[keep]
        self.length -= n - count
        return keep, self.strategy.score(signals)[0], self.alive


def _whole_model(
    strategy: Strategy, keep: float, params: dict[str, Any], tensors: Tensors
) -> dict[str, Output]:
    model = llama(params, tensors)
    visual = span(params["n_total"], tuple(params["image_span"][0]))
    cache = DynamicCache(config=model.config)
    ours: dict[str, Output] = {}
    with staged(model, strategy, keep, visual) as decoding:
        out = model(inputs_embeds=tensors["in.inputs_embeds"], past_key_values=cache)
        lengths = [cache.get_seq_length(i) for i in range(len(model.layers))]
        steps = tensors["in.decode_embeds"].split(1, dim=1)
        hidden = [
            model(inputs_embeds=step, past_key_values=cache).last_hidden_state for step in steps
        ]
    before = Cut.whole(torch.ones_like(visual))
    first = int(visual[0].nonzero()[0])
    for stage, layer in enumerate(params["prune_layers_1based"], start=1):
        cut, row = decoding.cuts[layer], decoding.rows[LastRow(layer)]
        columns = before.index[visual.gather(1, before.index)]
        ours[f"out.S{stage}.scores"] = row[:, columns]
        kept = cut.index[visual.gather(1, cut.index)]
        ours[f"out.S{stage}.keep"] = torch.searchsorted(columns, kept)[None]
        ours[f"out.S{stage}.keep_orig"] = (kept - first)[None]
        assert cut.moved is not None
        ours[f"out.S{stage}.position_ids"] = cut.index - cut.moved
        before = cut
    ours["out.keep"] = ours[f"out.S{len(decoding.cuts)}.keep_orig"]
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
