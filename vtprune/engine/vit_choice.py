"""From the tokens between two halves of a block to one selection of a batch, filled up if need be.

A strategy is never shown what only fills a row up: rows of equal length are decided together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from vtprune.engine.signals import select_group
from vtprune.engine.vit_plan import Plan
from vtprune.types import Maps, Mix, Selection, Signals


def choose(
    plan: Plan, layer: int, signals: Signals, lengths: Sequence[int] | None
) -> tuple[Selection, bool]:
    """Returns what a block leaves, and whether rows are filled up in it.

    Args:
        lengths: per image how many tokens, from the first, do not only fill its row up; None = all.
    """
    if lengths is None:
        counts = plan.counts(layer, signals)
        if isinstance(counts, int):
            return select_group(plan.strategy, signals, counts), False
    rows = list(lengths or [signals.n] * len(signals.tokens))
    each: dict[int, Selection] = {}
    for n, members in _alike(rows).items():
        group = _cut(signals, members, n)
        counts = plan.counts(layer, group)
        counts = [counts] * len(members) if isinstance(counts, int) else counts
        for k, places in _alike(counts).items():
            part = group.rows(torch.tensor(places, device=group.tokens.device))
            chosen = select_group(plan.strategy, part, k)
            each |= {members[place]: chosen.row(i) for i, place in enumerate(places)}
    return _filled([each[i] for i in range(len(rows))], signals), True


def _alike(numbers: Sequence[int]) -> dict[int, list[int]]:
    """Returns the places of each number."""
    found: dict[int, list[int]] = defaultdict(list)
    for place, number in enumerate(numbers):
        found[number].append(place)
    return found


def _cut(signals: Signals, members: Sequence[int], n: int) -> Signals:
    """Returns the signals of some images, of whose rows the first ``n`` tokens are real."""
    part = signals.rows(torch.tensor(members, device=signals.tokens.device))
    if n == signals.n:
        return part
    size = None if part.size is None else part.size[:, :n]
    values = {need: _of(need, value, n, part.n_prefix) for need, value in part.values.items()}
    return replace(part, tokens=part.tokens[:, :n], grid=None, values=values, size=size)


def _of(need: object, value: Tensor, n: int, n_prefix: int) -> Tensor:
    if isinstance(need, Maps):
        return value[:, :, : n + n_prefix, : n + n_prefix]
    return value[:, :n]


def _filled(each: Sequence[Selection], signals: Signals) -> Selection:
    """Puts selections of one image each into one, of as many outputs as the longest has."""
    sizes = signals.size
    if sizes is None:
        sizes = torch.ones(signals.tokens.shape[:2], device=signals.tokens.device)
    counted = [s.counted(sizes[i : i + 1, : s.n]) for i, s in enumerate(each)]
    edges = list(zip(*map(_edges, each), strict=True))
    source, target = (_even(part) for part in edges[:2])
    weight = _even(edges[2], last=False)
    rows = _even([s.slots for s in each])
    return Selection(rows, signals.n, Mix(source, target, weight), _even(counted, last=False))


def _even(parts: Sequence[Tensor], last: bool = True) -> Tensor:
    """Puts rows ``[1, n_i]`` into one tensor, repeating the ``last`` of each, or zero, behind."""
    width = max(part.shape[1] for part in parts)
    behind = [part[:, -1:] if last else torch.zeros_like(part[:, :1]) for part in parts]
    pairs = zip(parts, behind, strict=True)
    return torch.cat([torch.cat([x, y.expand(-1, width - x.shape[1])], dim=1) for x, y in pairs])


def _edges(chosen: Selection) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the edges of a selection, of one weight each where it only keeps."""
    if chosen.mix is not None:
        return chosen.mix.source, chosen.mix.target, chosen.mix.weight
    rows = chosen.rows
    target = torch.arange(rows.shape[1], device=rows.device).expand_as(rows)
    return rows, target, torch.ones(rows.shape, device=rows.device)
