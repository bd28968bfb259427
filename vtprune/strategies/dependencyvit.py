"""DependencyViT-Lite: patches that hardly send anything any more leave in four of the blocks.

In a ViT trained for it attention is turned around: each token sends to those that it attends to,
through few heads, and a controller makes it ever quieter from block to block; the quietest leave
between attention and MLP, and the mean over patches counts the rest by how loud they are.
arXiv 2304.03282 (dingmyu/DependencyViT holds no code; this is after the paper and a third party's
re-implementation). Which tokens are leaves that code leaves open: here those that send least, which
is what the controller says. Such a ViT is trained by ``vtprune train dependencyvit``. In any other,
without training, the nearest thing to a leaf is a token that nobody listens to: there those leave
that receive least attention in that block. Defaults: the paper.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, cast

from torch import Tensor, nn

from vtprune.attending import Attended, Attending
from vtprune.errors import ConfigError
from vtprune.scoring.messages import Messenger, reversed_attention, silent
from vtprune.scoring.schedule import Falling
from vtprune.trained import Modules
from vtprune.types import (
    Attention,
    AttentionRule,
    Budget,
    Facts,
    Left,
    Need,
    Quantity,
    Received,
    Scope,
    Signals,
    Site,
    Stage,
    Strategy,
)

BLOCKS = (1, 4, 7, 10)  # of 12, 0-based
LOUDNESS = "loudness"


def _messenger(tensors: Mapping[str, Tensor]) -> Messenger:
    heads, width = tensors["heads.weight"].shape
    return Messenger(width, heads)


TRAIN = (
    "Train a ViT with 'vtprune train dependencyvit --model mini-vit --out FOLDER' and wrap that."
)
MESSENGERS = Modules("messengers", "dependencyvit.safetensors", TRAIN, _messenger)


@dataclass(frozen=True)
class Sending(AttentionRule):
    """The attention of a block, turned around; ``source`` is as ``MESSENGERS.load`` takes it."""

    layer: int
    source: str | nn.ModuleList

    pooled: ClassVar[str | None] = LOUDNESS

    def attend(self, given: Attending) -> Attended:
        messengers = MESSENGERS.load(self.source, given.x.device)
        messenger = cast(Messenger, messengers[self.layer])
        loud = messenger.control(given.x)  # [B, S]
        if LOUDNESS in given.tokens:
            loud = loud * given.tokens[LOUDNESS]
        loud = silent(loud, given.real)
        sent = messenger.select(given.x) * loud[:, None]
        out = reversed_attention(given.logits(), given.v, sent)
        return Attended(out.to(given.v.dtype), {LOUDNESS: loud})


@dataclass(frozen=True)
class DependencyViT(Strategy):
    """``layers`` are the blocks in which patches leave, the same share of all in each.

    ``messengers``: the trained part of the ViT: a file, a folder that holds it, or themselves; by
    default that in the folder which the ViT was loaded from. Where there is none, attention stays
    as it is, and patches leave by the attention that they receive.
    """

    scope: ClassVar[Scope] = "tile"

    messengers: str | nn.ModuleList | None = None

    def beside(self, folder: str) -> DependencyViT:
        if self.messengers is not None:
            return self
        return replace(self, messengers=MESSENGERS.beside(folder))

    def default_layers(self, facts: Facts) -> tuple[int, ...]:
        if not facts.in_tower:
            return (facts.feature_block,)
        return tuple(sorted({min(facts.scale(i, 12), facts.feature_block) for i in BLOCKS}))

    def check_budget(self, budget: Budget, facts: Facts) -> None:
        if self.messengers is None:
            return
        depth = len(MESSENGERS.load(self.messengers))
        if depth != facts.vision_layers:
            raise ConfigError(
                f"The messengers are for {depth} blocks; {facts.family} has {facts.vision_layers}. "
                f"{TRAIN}"
            )

    def read(self, layer: int) -> Quantity:
        """Returns by what patches leave in a block."""
        return Received(layer) if self.messengers is None else Left(layer, LOUDNESS)

    def needs(self, facts: Facts) -> tuple[Need, ...]:
        return tuple(self.read(layer) for layer in self.used_layers(facts))

    def plan(self, facts: Facts) -> tuple[Stage, ...]:
        layers = self.used_layers(facts)
        if self.messengers is None:
            if not facts.in_tower:
                return (Stage(Site.PROJECTOR, (self.read(layers[-1]),)),)
            return tuple(
                Stage(Site.ENCODER, (self.read(i),), i, Falling(t + 1, len(layers)), True)
                for t, i in enumerate(layers)
            )
        return tuple(self._sending(i, layers) for i in range(facts.vision_layers))

    def _sending(self, layer: int, layers: tuple[int, ...]) -> Stage:
        return Stage(
            Site.ENCODER,
            (Attention(), self.read(layer)),
            layer,
            Falling(sum(i <= layer for i in layers), len(layers)),
            before_mlp=True,
            attend=Sending(layer, self.messengers or ""),
        )

    def counts(self, signals: Signals, budget: Budget) -> list[int]:
        inside = signals.inside
        if inside is None:
            return super().counts(signals, budget)
        return [min(signals.n, budget.count(n)) for n in inside.entered]

    def score(self, signals: Signals) -> Tensor:
        return signals.stack(Received, Left)[-1]
