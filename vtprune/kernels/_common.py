"""What the operations share: argument checks, precision and memory limits."""

from __future__ import annotations

import torch
from torch import Tensor

from vtprune.errors import ConfigError, InputError

MIB = 1 << 20


def check_count(k: int, n: int, op: str) -> None:
    """Raises ConfigError unless ``k`` tokens can be taken of ``n``."""
    if isinstance(k, bool) or not isinstance(k, int) or not 0 <= k <= n:
        raise ConfigError(f"{op}: k={k!r}, but there are {n} tokens; give an int from 0 to {n}.")


def check_dims(x: Tensor, dims: str, op: str) -> None:
    """Raises InputError unless ``x`` is floating point and has the dimensions of ``dims``."""
    if x.ndim != len(dims.split(", ")) or not x.is_floating_point():
        raise InputError(f"{op}: got {list(x.shape)} {x.dtype}; give a float tensor [{dims}].")


def widened(x: Tensor) -> Tensor:
    """Returns ``x`` in float32; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def full_precision(x: Tensor) -> torch.autocast:
    """Turns autocast off on the device of ``x``: it would round products to 16 bits."""
    return torch.autocast(x.device.type, enabled=False)
