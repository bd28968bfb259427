"""VisionZip: keep the dominant tokens by [CLS] attention and merge the rest into a few.

The rest is merged by key similarity around evenly spaced targets, so that what is dropped still
leaves a trace. arXiv 2412.04467 (dvlab-research/VisionZip). As in the official code the [CLS] state
itself is one of the dominant tokens and comes first, merged tokens (target plus the mean of those
assigned to it) come last, and all of it happens before the projector. A tower without [CLS] ranks
by attention received and keeps no [CLS]. Where a visual token is made of several patches, both
happen to the projected tokens, with the mean of their patches' attention and keys, and no [CLS].
Defaults: official code; contextual from its README.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtprune.errors import ConfigError
from vtprune.kernels.gather_tokens import gather_tokens
from vtprune.kernels.topk_sorted import topk_sorted
from vtprune.scoring.attention import salience, salience_needs
from vtprune.scoring.diversity import nearest, outside
from vtprune.types import (
    ClsRow,
    Facts,
    Keys,
    Mix,
    Need,
    Scope,
    Selection,
    Signals,
    Site,
    Stage,
    Strategy,
)


@dataclass(frozen=True)
class VisionZip(Strategy):
    """``contextual``: merged tokens among those kept; by default 5 of 32, the authors' ratio."""

    scope: ClassVar[Scope] = "tile"

    contextual: int | None = None

    def __post_init__(self) -> None:
        if self.contextual is not None and (
            isinstance(self.contextual, bool) or self.contextual < 0
        ):
            raise ConfigError(f"contextual={self.contextual!r} must be a count of at least 0.")

    def default_layers(self, facts: Facts) -> tuple[int, ...]:
        return (facts.feature_block,)

    def needs(self, facts: Facts) -> tuple[Need, ...]:
        layers = self.used_layers(facts)
        return (*salience_needs(layers, facts), *(Keys(layer) for layer in layers[-1:]))

    def plan(self, facts: Facts) -> tuple[Stage, ...]:
        return (Stage(Site.ENCODER if facts.in_tower else Site.PROJECTOR, self.needs(facts)),)

    def select(self, signals: Signals, k: int) -> Selection:
        has_cls = signals.n_prefix > 0 and any(isinstance(n, ClsRow) for n in signals.values)
        n_merged = round(k * 5 / 32) if self.contextual is None else self.contextual
        n_top = k - n_merged - has_cls
        if n_top < 0:
            raise ConfigError(
                f"contextual={n_merged} leaves no room for dominant tokens in keep={k}."
            )
        n_merged = min(n_merged, signals.n - n_top)
        top = topk_sorted(salience(signals), n_top)  # [B, n_top]
        rest = outside(top, signals.n)  # [B, M]
        step = max(1, rest.shape[1] // max(1, n_merged))
        is_target = torch.zeros(rest.shape[1], dtype=torch.bool, device=rest.device)
        is_target[::step][:n_merged] = True
        targets, others = rest[:, is_target], rest[:, ~is_target]
        (keys,) = signals.stack(Keys)
        owner = nearest(*gather_tokens(others, keys), *gather_tokens(targets, keys))
        return _selection(signals.n, has_cls, top, targets, others, owner)


def _selection(
    n: int, has_cls: bool, top: Tensor, targets: Tensor, others: Tensor, owner: Tensor
) -> Selection:
    """Puts [CLS] (source n), dominant and merged tokens together; ``owner`` ``[B, M - T]``."""
    new = top.new_full((len(top), int(has_cls)), -1)
    rows = torch.cat([new, top, targets], dim=1)
    if not targets.shape[1]:
        others, owner = others[:, :0], owner[:, :0]
    first = rows.shape[1] - targets.shape[1]
    count = torch.zeros_like(targets).scatter_add_(1, owner, torch.ones_like(owner))
    share = 1.0 / count.clamp(min=1).float().gather(1, owner)
    source = torch.cat([torch.where(rows < 0, n, rows), others], dim=1)
    itself = torch.arange(rows.shape[1], device=rows.device).expand_as(rows)
    target = torch.cat([itself, first + owner], dim=1)
    weight = torch.cat([torch.ones_like(rows, dtype=share.dtype), share], dim=1)
    return Selection(rows, n, Mix(source, target, weight))
