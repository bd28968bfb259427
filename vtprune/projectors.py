"""Projectors: one per layer, which makes what visual tokens are there of the tower's features.

A file of them is safetensors: ``layers.<k>.linear_1.weight`` ``[H, C]`` and ``.bias``, then
``linear_2`` ``[D, H]``, for each layer k, 0-based, of a language model of width D; C is the width
of the vision tower. Between the two is a GELU. The authors' H is D.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vtprune.errors import ConfigError, InputError
from vtprune.kernels._common import full_precision
from vtprune.needs import TowerNeed
from vtprune.trained import Trained, write

TRAIN = "Train some with 'vtprune train saisa --model ... --out FILE' and give projectors=FILE."
KIND = Trained("projectors", "saisa_projectors.safetensors", TRAIN)


class Projector(nn.Module):
    """``Linear - GELU - Linear``, from ``features`` by ``hidden`` to ``width`` values."""

    def __init__(self, features: int, hidden: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(features, hidden)
        self.linear_2 = nn.Linear(hidden, width)

    def forward(self, features: Tensor) -> Tensor:
        """Returns ``[M, D]`` float32 of features ``[M, C]``."""
        first, second = self.linear_1, self.linear_2
        with full_precision(features):
            units = F.gelu(F.linear(features.float(), first.weight.float(), first.bias.float()))
            return F.linear(units, second.weight.float(), second.bias.float())


class Projectors(nn.Module):
    """The projectors of a language model, in the order of its layers."""

    def __init__(self, layers: list[Projector]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    @property
    def depth(self) -> int:
        return len(self.layers)

    def __repr__(self) -> str:
        first, second = self.of(0).linear_1, self.of(0).linear_2
        sizes = first.in_features, first.out_features, second.out_features
        return f"Projectors({self.depth} layers, {' - '.join(map(str, sizes))})"

    def of(self, layer: int) -> Projector:
        """Returns the projector of a layer (0-based)."""
        return cast(Projector, self.layers[layer])

    def make(self, features: Tensor, layer: int, width: int) -> Tensor:
        """Returns what visual tokens are in a layer, ``[M, D]`` float32.

        Args:
            features: ``[M, C]``; ``width``: D.

        Raises:
            InputError: the model has other widths.
        """
        projector = self.of(layer)
        made = projector.linear_1.in_features, projector.linear_2.out_features
        if made != (features.shape[1], width):
            raise InputError(
                f"The projectors make {made[1]} values of {made[0]}, but this model has a tower of "
                f"{features.shape[1]} and a language model of {width}. They are of another model. "
                f"{TRAIN}"
            )
        return projector(features.to(projector.linear_1.weight.device))


@dataclass(frozen=True)
class Projected:
    """Makes the visual tokens of one layer of what ``need`` reads in the tower.

    ``source`` is as ``load`` takes it.
    """

    layer: int
    need: TowerNeed
    source: str | Projectors | None = None

    def make(self, features: Tensor, width: int) -> Tensor:
        """Returns ``[M, width]`` float32 of features ``[M, C]``."""
        return load(self.source, features.device).make(features, self.layer, width)

    def macs(self) -> int:
        """Returns the multiply-accumulates for one token."""
        projector = load(self.source).of(self.layer)
        return projector.linear_1.weight.numel() + projector.linear_2.weight.numel()

    def __str__(self) -> str:
        return f"made of {type(self.need).__name__}({self.need.layer}) by a projector"


def load(source: str | Projectors | None, device: torch.device | str = "cpu") -> Projectors:
    """Returns the projectors of a file or a shipped model, read once per device, or given ones.

    Raises:
        ConfigError: none are given, there is no such file, or it holds none.
    """
    if isinstance(source, Projectors):
        return source
    if source is None:
        raise ConfigError(f"saisa has no projectors for this model. {TRAIN}")
    return KIND.read(source, str(torch.device(device)), _load)


def _load(path: Path, device: str) -> Projectors:
    try:
        tensors = load_file(path, device=device)
        projectors = _empty(tensors)
        projectors.load_state_dict(tensors, assign=True)
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f"{path} holds no projectors: {reason}. {TRAIN}") from error
    return projectors.requires_grad_(False).eval()


def save(projectors: Projectors, path: Path) -> None:
    """Writes projectors to a file, whole or not at all."""
    write(projectors.state_dict(), path)


def _empty(tensors: dict[str, Tensor]) -> Projectors:
    """Returns projectors without values, so that no random number is drawn, of what is there."""
    hidden, features = tensors["layers.0.linear_1.weight"].shape
    width = len(tensors["layers.0.linear_2.weight"])
    depth = sum(name.endswith(".linear_1.weight") for name in tensors)
    with torch.device("meta"):
        return Projectors([Projector(features, hidden, width) for _ in range(depth)])
