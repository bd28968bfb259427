"""Measuring accuracy against token budget: scenes, shipped models, sweeps."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vtprune.eval.shipped import load

__all__ = ["load"]


def __getattr__(name: str) -> object:
    if name != "load":  # imported on first use: it brings torch
        raise AttributeError(f"module 'vtprune.eval' has no attribute {name!r}")
    from vtprune.eval.shipped import load

    return load
