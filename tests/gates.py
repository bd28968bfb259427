"""Gates with random weights, calibrated on random states."""

from __future__ import annotations

from pathlib import Path

import torch

from vtprune.gates import Form, Gates, make, save


def random_gates(
    folder: Path,
    depth: int = 4,
    width: int = 64,
    form: Form = "per_layer",
    *,
    samples: int = 128,
    seed: int = 0,
) -> Path:
    """Writes gates of a tiny model, by default of ``tiny.build``, and returns their file."""
    gates = make(form, depth, width, hidden=16)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in gates.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        gates.margins = margins(gates, torch.randn(samples, depth, width, generator=generator))
    path = folder / f"{form}-{depth}-{width}.safetensors"
    save(gates, path)
    return path


def margins(gates: Gates, states: torch.Tensor) -> torch.Tensor:
    """Returns what gates make of states ``[S, depth, W]`` that enter each layer."""
    found = [gates.margin(states[:, layer], layer) for layer in range(1, gates.depth)]
    return torch.stack([torch.full((len(states),), -torch.inf), *found], dim=1)
