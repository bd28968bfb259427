"""HoliTom: one video; where rows end with newlines, these follow every row that has a token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.golden_adapters._video import clip
from tests.golden_harness import Output, Tensors
from vtprune.scoring.still import Pool, segments, still_runs
from vtprune.scoring.temporal import changes
from vtprune.strategies.holitom import WINDOW, HoliTom
from vtprune.types import Budget, Received


def from_golden(params: dict[str, Any], tensors: Tensors) -> dict[str, Output]:
    strategy = HoliTom(params["tau"], params["beta"], params["K"], params["D"], compat=True)
    assert params["max_window"] == WINDOW
    x, share = tensors["in.x"], params["retain_ratio"]
    signals = clip(x, len(x), share)
    signals.values = {Received(0): tensors["in.attn"].flatten()[None]}
    (k,) = strategy.counts(signals, Budget(fraction=share))
    made = strategy.select(signals, k)
    tokens = made.apply(signals.tokens)[0]
    spans, removed = segments(still_runs(changes(x[1:], x[:-1]) < 1 - strategy.tau), WINDOW)
    ours: dict[str, Output] = {
        "out.tokens": tokens,
        "out.segments": torch.tensor(spans) - torch.tensor([0, 1]),
        "out.retain": torch.tensor([min(1.0, share / (1 - removed / signals.n))]),
        "out.removed": torch.tensor([removed]),
        "out.rows": tensors["out.rows"],
    }
    rows = _rows(strategy.pools(x), made.rows[0], x.shape[1], spans)
    if "in.newline" in tensors:
        return ours | {"out.tokens": _lines(rows, tokens, tensors["in.newline"], params["grid"][1])}
    return ours | {"out.rows": rows}


def _rows(pools: list[Pool], kept: Tensor, n: int, spans: list[tuple[int, int]]) -> Tensor:
    """Of each output its segment, frame, place, and whether that stands still, ``[K, 4]``."""
    rows = []
    for position in kept.tolist():
        frame, place = divmod(position, n)
        segment = next(i for i, (first, end) in enumerate(spans) if first <= frame < end)
        still = any(p.frames > 1 and p.span[0] == frame and place in p.places for p in pools)
        rows.append([segment, frame, place, int(still)])
    return torch.tensor(rows)


def _lines(rows: Tensor, tokens: Tensor, newline: Tensor, width: int) -> Tensor:
    """Tokens in order of their places, frame by frame, a newline after each line that has some."""
    order = sorted(range(len(rows)), key=lambda i: rows[i, 1:3].tolist())
    out: list[Tensor] = []
    for turn, i in enumerate(order):
        out.append(tokens[i])
        _, frame, place, _ = rows[i].tolist()
        after = rows[order[turn + 1]].tolist() if turn + 1 < len(order) else None
        if after is None or (after[1], after[2] // width) != (frame, place // width):
            out.append(newline[0])
    return torch.stack(out)
