"""Trains what strategies add to a ViT, on pictures of single things; the ViT learns nothing.

What is trained for a strategy is a list of modules, in the order of the blocks or stages that they
belong to. They are written to one file, which the strategy finds beside the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vtprune.engine.vit_wrap import find_vit
from vtprune.errors import ConfigError
from vtprune.eval.train_loop import Show, Stage, Trainer
from vtprune.eval.train_vit import Shown, shown
from vtprune.vit_adapters._base import ViTAdapter

FIRST = 900_000_000  # training picture; far behind those that the shipped models have seen

# What gives the attention of a block: its number, states ``[B, S, C]`` before and after the norm,
# queries, keys and values; ``[B, H, S, d]`` it returns.
Attention = Callable[[int, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


class BesideTrainer(Trainer):
    """Trains ``heads`` beside a model that stays as it is."""

    first = FIRST

    def __init__(self, model: Any, heads: nn.Module, out: Path, stages: tuple[Stage, ...]) -> None:
        self.adapter, self.stages = served(model), stages
        model.requires_grad_(False).eval()
        super().__init__(model, None, heads, out)

    def show(self, stage: Stage, n: int) -> Show:
        return lambda first, size: shown(first, n)

    def _groups(self, stage: Stage) -> list[dict[str, Any]]:
        return [{"params": list(self.heads.parameters()), "peak": stage.lr}]

    def save(self, folder: Path) -> None:
        """Writes nothing: what was trained is in ``heads``."""


def served(model: Any) -> ViTAdapter:
    """Returns the adapter of a ViT.

    Raises:
        ConfigError: the model is none.
    """
    adapter = find_vit(model)
    if adapter is None:
        raise ConfigError(f"{type(model).__name__} is no ViT. Give mini-vit or a folder of one.")
    return adapter


@contextmanager
def attending(adapter: ViTAdapter, attention: Attention) -> Iterator[None]:
    """Lets ``attention`` stand for that of all blocks."""
    blocks = list(adapter.blocks)
    try:
        for layer, block in enumerate(blocks):
            block.forward = partial(_run, adapter, attention, layer, block)
        yield
    finally:
        for block in blocks:
            vars(block).pop("forward", None)


def _run(
    adapter: ViTAdapter, attention: Attention, layer: int, block: Any, x: Tensor, **given: Any
) -> Tensor:
    normed = adapter.norm(block, x)
    q, k, v = adapter.project(adapter.attention(block), normed)
    out = attention(layer, x, normed, q, k, v)
    x = x + adapter.attended(block, out.transpose(1, 2).flatten(2), normed)
    return x + adapter.passed(block, x)


__all__ = ["FIRST", "BesideTrainer", "Shown", "attending", "served"]
