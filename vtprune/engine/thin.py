"""An MLP of which only the first hidden neurons are there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vtprune.errors import UnsupportedError

INTO, OUT = ("gate_proj", "up_proj"), "down_proj"


class _Bare(nn.Module):
    """Runs the module without the hooks that it has."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner.forward(x)


def thin(mlp: Any, share: float) -> Callable[[Tensor], Tensor]:
    """Returns ``mlp`` with the first ``share`` of its hidden neurons; weights are not copied.

    Raises:
        UnsupportedError: it is not a gated MLP of three projections.
    """
    if any(not isinstance(getattr(mlp, name, None), nn.Linear) for name in (*INTO, OUT)):
        raise UnsupportedError(
            f"{type(mlp).__name__} is no MLP of {', '.join(INTO)} and {OUT}, so none of its "
            "neurons can be left out. Give the visual rows all of it (mlp_ratio=1)."
        )
    bare = _Bare(mlp)

    def run(x: Tensor) -> Tensor:
        n = int(mlp.down_proj.in_features * share + 1e-6)
        weights = {f"inner.{name}": value for name, value in mlp.named_parameters()}
        for name in weights:
            if OUT in name:
                weights[name] = weights[name][:, :n] if name.endswith("weight") else weights[name]
            elif any(part in name for part in INTO):
                weights[name] = weights[name][:n]
        return torch.func.functional_call(bare, weights, (x,))

    return run
