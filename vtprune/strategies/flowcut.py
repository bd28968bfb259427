"""FlowCut: let tokens leave every second block of the tower, by a score that runs along.

A block scores a patch by its attention from [CLS] and by how alike its value is to that of [CLS],
times the size of its value; the moving average of these scores ranks, and how even the attention is
decides how many leave at a stage. Later blocks of the tower, the projector and the prefill run on
fewer tokens. arXiv 2505.19536 (TungChintao/FlowCut). The official code lets all images of a batch
lose equally many at a stage; here that holds for the tiles of one image, and for all under
``compat``. In a tower without [CLS] the mean query and the mean value take its place, in all three
terms. Where a visual token is made of several patches, all leave after the projector, by the score
of the blocks that can be read. The authors' further stage in the language model of LLaVA-NeXT and
Qwen is left out: ``keep`` is what the tower leaves.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vtprune.scoring.flow import largest, n_leaving, running
from vtprune.types import Budget, Facts, Flow, Need, Signals, Site, Stage, Strategy


@dataclass(frozen=True)
class FlowCut(Strategy):
    """``layers`` are the blocks that score, by default all before the features.

    Tokens leave after the last of them and every second block before it. ``compat`` couples the
    images of a batch as the official code does.
    """

    compat: bool = False

    def default_layers(self, facts: Facts) -> tuple[int, ...]:
        return tuple(range(max(1, facts.feature_block + (not facts.in_tower))))

    def needs(self, facts: Facts) -> tuple[Need, ...]:
        return tuple(Flow(layer) for layer in self.used_layers(facts))

    def plan(self, facts: Facts) -> tuple[Stage, ...]:
        if not facts.in_tower:
            return (Stage(Site.PROJECTOR, self.needs(facts)),)
        layers = self.used_layers(facts)
        return tuple(
            Stage(Site.ENCODER, tuple(Flow(read) for read in layers if read <= layer), layer)
            for layer in layers
            if (layers[-1] - layer) % 2 == 0
        )

    def counts(self, signals: Signals, budget: Budget) -> list[int]:
        inside = signals.inside
        if inside is None:
            return super().counts(signals, budget)
        relation = signals.stack(Flow)[-1, ..., 0]
        target = [min(signals.n, budget.count(n)) for n in inside.entered]
        leaving = n_leaving(
            relation, relation.new_tensor(target), inside.layers[-1] - inside.layers[inside.stage]
        )
        if self.compat:
            leaving = leaving.amax().expand_as(leaving)
        else:
            leaving = largest(leaving, signals.item)
        left = signals.n - leaving.round().long()
        return [max(*pair) for pair in zip(left.tolist(), target, strict=True)]

    def score(self, signals: Signals) -> Tensor:
        return running(signals.stack(Flow)[..., 1])
