"""A language model built from recorded weights, with the engine's stages inside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaModel

from vtprune.engine import tap
from vtprune.engine.decoding import Decoding
from vtprune.engine.layers import Layers
from vtprune.engine.signals import Step
from vtprune.types import Budget, Facts, Site, Strategy

PREFIX = "in.weights."


def decoder(layers: int) -> Facts:
    """A language model of that many layers behind the authors' tower."""
    return Facts(24, 22, True, Facts.signals_of(cls_row=True), decoder_layers=layers)


def llama(params: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> LlamaModel:
    """Returns the recorded model; its embedding table is not used."""
    width = tensors[f"{PREFIX}layers.0.mlp.gate_proj.weight"].shape[0]
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=params["hidden"],
        intermediate_size=width,
        num_hidden_layers=params["layers"],
        num_attention_heads=params["heads"],
        rms_norm_eps=params["rms_norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": params["rope_theta"]},
        max_position_embeddings=512,
    )
    model = LlamaModel._from_config(config, attn_implementation="sdpa")
    names = [name for name in tensors if name.startswith(PREFIX)]
    weights = {name.removeprefix(PREFIX): tensors[name] for name in names}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert (missing, unexpected) == (["embed_tokens.weight"], [])
    return model.eval()


@contextmanager
def staged(
    model: LlamaModel, strategy: Strategy, keep: float | int, visual: Tensor
) -> Iterator[Decoding]:
    """Runs the model with the strategy's stages; ``visual`` ``[B, L]`` bool marks the image."""
    facts = decoder(len(model.layers))
    budget = Budget.of(keep)
    stages = [stage for stage in strategy.plan(facts) if stage.site is Site.DECODER]
    steps = [Step(strategy, s, budget.times(s.times), strategy.positions) for s in stages]
    images = visual.sum(1, keepdim=True).tolist()
    decoding = Decoding(torch.ones_like(visual), visual, visual, images)
    with ExitStack() as undo:
        tap.install("sdpa")
        undo.callback(tap.uninstall, "sdpa")
        Layers(model, list(model.layers), steps, lambda: decoding).install(undo)
        with torch.no_grad():
            yield decoding


def span(length: int, image: tuple[int, int]) -> Tensor:
    """Returns ``[1, length]`` bool, True from ``image[0]`` to before ``image[1]``."""
    columns = torch.arange(length)
    return ((columns >= image[0]) & (columns < image[1]))[None]


def mean(ratios: Sequence[float], layers: Sequence[int], depth: int) -> float:
    """Returns the mean share of visual tokens that enter a layer."""
    lengths = [b - a for a, b in pairwise((0, *layers, depth))]
    return sum(n * r for n, r in zip(lengths, (1.0, *ratios), strict=True)) / depth


def behind(decoding: Decoding, layer: int) -> int:
    """Returns by how much the position ids of decoded tokens are lowered in a layer."""
    cut = decoding.cut(layer)
    return 0 if cut is None or cut.behind is None else int(cut.behind)
