"""Replacing methods of one instance, and putting back what was there."""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def restore(model: nn.Module, name: str) -> Callable[[], None]:
    """Returns what puts the instance attribute ``name`` back as it is now."""
    had, before = name in vars(model), vars(model).get(name)

    def undo() -> None:
        if had:
            setattr(model, name, before)
        else:
            vars(model).pop(name, None)

    return undo


def bound(original: Callable[..., Any], replacement: Callable[..., Any]) -> Callable[..., Any]:
    """Calls ``replacement(original, named arguments)`` under the original's signature."""
    signature = inspect.signature(original)
    extra = [p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD]

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        batch = dict(signature.bind(*args, **kwargs).arguments)
        for name in extra:
            batch |= batch.pop(name, {})
        return replacement(original, batch)

    return call


def now(device: torch.device) -> float:
    """Returns seconds, after the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
