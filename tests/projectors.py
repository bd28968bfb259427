"""Projectors with random weights, and strategies that get them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from vtprune.engine.plan import find_adapter
from vtprune.projectors import Projector, Projectors
from vtprune.registry import build
from vtprune.types import Strategy


def random_projectors(
    depth: int = 4, features: int = 32, hidden: int = 48, width: int = 32, seed: int = 0
) -> Projectors:
    """Returns those of a tiny model, by default of ``tiny.build``, scaled up as its weights."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad(), torch.device("cpu"):
        made = Projectors([Projector(features, hidden, width) for _ in range(depth)])
        for parameter in made.parameters():
            scale = 1.2 / parameter[0].numel() ** 0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return made.requires_grad_(False)


def given(name: str, projectors: Projectors, **options: Any) -> Strategy:
    """Returns the strategy of that name, with projectors if it takes some."""
    strategy: Any = build(name, **options)
    return replace(strategy, projectors=projectors) if lacks(name) else strategy


def lacks(name: str) -> bool:
    """Returns whether a strategy takes projectors."""
    return "projectors" in type(build(name)).options()


def ready(name: str, model: Any, **options: Any) -> Strategy:
    """Returns the strategy of that name, with projectors of this model if it takes some."""
    return given(name, of(model), **options)


def of(model: Any) -> Projectors:
    """Returns projectors of the sizes of a model with a vision tower."""
    adapter = find_adapter(model)
    tower: Any = adapter.tower(adapter.modalities[0]).config
    features = getattr(tower, "embed_dim", None) or tower.hidden_size
    width = adapter.language_model.config.hidden_size
    return random_projectors(adapter.facts.decoder_layers, features, 24, width)
