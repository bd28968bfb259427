"""Replacing methods of one instance, and putting back what was there."""

from __future__ import annotations

import functools
import inspect
import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from vtprune.errors import UnsupportedError

# Handles that have not been removed.
live: weakref.WeakSet[Any] = weakref.WeakSet()


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


def refuse_overlap(model: nn.Module) -> None:
    """Raises UnsupportedError where ``model``, or a part of it, is wrapped already."""
    for handle in live:
        wrapped = handle.model
        if any(m is wrapped for m in model.modules()) or any(m is model for m in wrapped.modules()):
            names = " + ".join(step.strategy.name for step in handle.steps)
            raise UnsupportedError(
                f"{type(wrapped).__name__} is wrapped already (by {names}). Call remove() on that "
                "handle first, or give a list of strategies to one wrap()."
            )
