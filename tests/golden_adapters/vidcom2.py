"""VidCom2: one video, its frames' official budgets or the exact count."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.golden_adapters._video import clip, per_frame
from tests.golden_harness import Output, Tensors
from vtprune.scoring.temporal import framed, steady_channels, uniqueness
from vtprune.strategies.vidcom2 import SHARPNESS, VidCom2
from vtprune.types import Budget


def from_golden(params: dict[str, Any], tensors: Tensors) -> dict[str, Output]:
    n, share = params["tokens_per_frame"], params["base_scale"]
    flat = tensors["in.x"].flatten(0, -2)
    frames = len(flat) // n
    signals = clip(flat, frames, share)
    strategy = VidCom2(compat=not params["exact_budget"])
    video, frame = strategy.typicalities(signals)
    k = _count(strategy, signals, params, frames)
    kept = strategy.select(signals, k).rows[0]
    ours: dict[str, Output] = {
        "out.keep": kept,
        "out.scores": (video + frame)[0],
        "out.scales": uniqueness(video, share, SHARPNESS)[0],
        "out.channels": steady_channels(framed(signals))[0],
        "out.per_frame": per_frame(kept, frames, n),
    }
    if params["exact_budget"]:
        ours["out.base_per_frame"] = strategy.budgets(signals, share)[0]
    if "in.img" in tensors:
        ours |= _with_newlines(kept, frames, n, params["grid"])
        newlines = torch.ones(len(tensors["in.img"]), dtype=torch.bool)
        newlines[_in_grid(torch.arange(len(flat)), params["grid"][1])] = False
        assert torch.equal(tensors["in.img"][~newlines], flat)
    return ours


def _count(strategy: VidCom2, signals: Any, params: dict[str, Any], frames: int) -> int:
    if params["exact_budget"]:  # vLLM's count
        return max(frames, min(int(signals.n * (1 - params["pruning_rate"])), signals.n))
    return strategy.counts(signals, Budget(fraction=params["base_scale"]))[0]


def _in_grid(index: Tensor, width: int) -> Tensor:
    """Positions among patches to positions where a newline ends each row."""
    return index // width * (width + 1) + index % width


def _with_newlines(kept: Tensor, frames: int, n: int, grid: list[int]) -> dict[str, Output]:
    height, width = grid
    ends = torch.arange(frames * height).view(frames, height) * (width + 1) + width
    order = [torch.cat([_in_grid(kept[kept // n == t], width), ends[t]]) for t in range(frames)]
    listed = torch.cat(order)
    return {"out.order": listed, "out.keep": listed.sort().values}
