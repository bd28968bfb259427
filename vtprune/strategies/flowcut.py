"""FlowCut: let tokens leave every second block of the tower, by a score that runs along.

A block scores a patch by its attention from [CLS] and by how alike its value is to that of [CLS],
times the size of its value; the moving average of these scores ranks, and how even the attention is
decides how many leave at a stage. Later blocks of the tower, the projector and the prefill run on
fewer tokens. arXiv 2505.19536 (TungChintao/FlowCut). As the authors do for LLaVA-NeXT and Qwen, the
tower leaves twice the budget where images differ in their number of tokens, and early in the
language model the same score, of the last prompt token, leaves the budget. Tokens made of no patch
(newlines, which the authors drop) are not chosen from there either: they stay. Qwen's authors score
patches without the similarity of values; here there is one score. The official code lets all images
of a batch lose equally many at a stage; here that holds for equally long tiles of one image, and
for all under ``compat``. In a tower without [CLS] the mean query and the mean value take its place,
in all three terms. Where a visual token is made of several patches, all leave after the projector,
by the score of the blocks that can be read. Defaults: official code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtprune.errors import ConfigError
from vtprune.scoring.flow import largest, n_leaving, running
from vtprune.types import Budget, Facts, Flow, LastFlow, Need, Scope, Signals, Site, Stage, Strategy


@dataclass(frozen=True)
class FlowCut(Strategy):
    """``layers`` are the blocks that score, by default all before the features.

    Tokens leave after the last of them and every second block before it. ``compat`` couples the
    images of a batch as the official code does. ``inside``: whether tokens leave before layer 2 of
    32 of the language model too; None = where the number of an image's tokens depends on the image.
    """

    scope: ClassVar[Scope] = "tile"

    compat: bool = False
    inside: bool | None = None

    def __post_init__(self) -> None:
        if self.inside is not None and not isinstance(self.inside, bool):
            raise ConfigError(f"inside={self.inside!r} must be True, False or None.")

    def default_layers(self, facts: Facts) -> tuple[int, ...]:
        return tuple(range(max(1, facts.feature_block + (not facts.in_tower))))

    def needs(self, facts: Facts) -> tuple[Need, ...]:
        return tuple(Flow(layer) for layer in self.used_layers(facts))

    def plan(self, facts: Facts) -> tuple[Stage, ...]:
        inside = self._inside(facts)
        times = 1 + len(inside)
        if not facts.in_tower:
            return (Stage(Site.PROJECTOR, self.needs(facts), times=times), *inside)
        layers = self.used_layers(facts)
        tower = [
            Stage(Site.ENCODER, tuple(Flow(read) for read in layers if read <= layer), layer, times)
            for layer in layers
            if (layers[-1] - layer) % 2 == 0
        ]
        return (*tower, *inside)

    def _inside(self, facts: Facts) -> tuple[Stage, ...]:
        """Returns the stage inside the language model, where there is to be one."""
        can = facts.decoder_layers > facts.first_stage
        if self.inside and not can:
            raise ConfigError(
                f"inside=True: {facts.family} has no layer of its language model before which "
                "tokens may leave; leave it out."
            )
        wanted = facts.n_tokens is None if self.inside is None else self.inside
        if not (wanted and can):
            return ()
        layer = facts.scale_decoder(2, 32)
        return (Stage(Site.DECODER, (LastFlow(layer - 1),), layer),)

    def counts(self, signals: Signals, budget: Budget) -> list[int]:
        inside = signals.inside
        if inside is None:
            return super().counts(signals, budget)
        if inside.images:  # a row is a sample
            return [min(signals.n, sum(map(budget.count, images))) for images in inside.images]
        relation = signals.stack(Flow)[-1, ..., 0]
        target = [min(signals.n, budget.count(n)) for n in inside.entered]
        wanted = torch.tensor(target, device=relation.device)
        leaving = n_leaving(relation, wanted, inside.layers[-1] - inside.layers[inside.stage])
        if self.compat:
            leaving = leaving.amax().expand_as(leaving)
        else:
            leaving = largest(leaving, signals.item)
        left = signals.n - leaving.round().long()
        return [max(*pair) for pair in zip(left.tolist(), target, strict=True)]

    def score(self, signals: Signals) -> Tensor:
        if any(isinstance(need, LastFlow) for need in signals.values):
            return signals.stack(LastFlow)[-1]
        return running(signals.stack(Flow)[..., 1])
