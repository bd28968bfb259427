"""Random weights of a size at which attention and arg-max mean something."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# Vectors that become tokens; every other vector (norm, bias, scale) stays as it is initialized.
_TOKENS = ("image_newline", "class_embedding")


def _fan_in(name: str, weight: Tensor) -> int:
    """Inputs of one output: all of a convolution's kernel, the last axis of anything else."""
    if name.endswith("mm_input_projection_weight"):  # Gemma3 multiplies from the left: [in, out].
        return weight.shape[0]
    return weight[0].numel() if weight.ndim > 3 else weight.shape[-1]


def random_model(cls: Any, config: Any, attention: str, seed: int) -> Any:
    """Returns a model whose matrices, kernels and embeddings are N(0, 1.44 / fan-in)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cls._from_config(config, attn_implementation=attention)
    _randomize(model, torch.Generator().manual_seed(seed))
    return model


@torch.no_grad()
def _randomize(model: nn.Module, generator: torch.Generator) -> None:
    for name, weight in model.named_parameters():
        if weight.ndim >= 2 or name.endswith(_TOKENS):
            scale = 1.2 / _fan_in(name, weight) ** 0.5
            weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
