"""Sparsifiner: each query attends to a quarter of the keys, those that a predictor connects it to.

In every block and head a small trained predictor guesses the attention map from a few landmarks,
and each query sees only the keys of its highest guesses; [CLS] sees all. arXiv 2303.13755
(lim142857/Sparsifiner). No token leaves. What is saved is for a sparse kernel to save: here, as in
that code, the whole map is computed and masked, and reports give the operations that count as what
they are, theoretical. ``vtprune train sparsifiner`` makes predictors for a ViT, whose own weights
stay, where the authors train it along with them. With a ``rate`` below 1 patches leave too, before
the MLP of the blocks ``at``, where [CLS] of the masked attention heeds them least; unlike in that
code they are taken away, not hidden, and each image has a budget of its own. Defaults: official
code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from vtprune.attending import Attended, Attending, gathered
from vtprune.errors import ConfigError, UnsupportedError
from vtprune.scoring.connectivity import BASES, Connectivity, connections, n_seen
from vtprune.trained import Modules
from vtprune.types import (
    Attention,
    AttentionRule,
    Budget,
    ClsRow,
    Facts,
    Need,
    Received,
    Scope,
    Signals,
    Site,
    Stage,
    Strategy,
    check_needs,
)

PLACE = "place"


def _connectivity(tensors: Mapping[str, Tensor]) -> Connectivity:
    return Connectivity(len(tensors["down"]), tensors["q.weight"].shape[1], tensors["up"].shape[1])


TRAIN = "Train some with 'vtprune train sparsifiner --model ... --out FILE' and give them."
PREDICTORS = Modules("predictors", "sparsifiner.safetensors", TRAIN, _connectivity)


@dataclass(frozen=True)
class Sparse(AttentionRule):
    """The attention of a block, from each query to the keys that it is connected to.

    ``source`` is as ``PREDICTORS.load`` takes it; ``seen``: keys per query, as a share of the
    tokens that enter the first block.
    """

    layer: int
    source: str | nn.ModuleList | None
    seen: float

    def attend(self, given: Attending) -> Attended:
        predictor = cast(Connectivity, PREDICTORS.load(self.source, given.q.device)[self.layer])
        tokens = len(predictor.down)
        places = self._places(given, tokens)
        with torch.no_grad():
            guess = predictor.approximate(given.q, given.k, places)
            budget = n_seen(self.seen, tokens)
            seen = connections(guess, given.n_prefix, budget, given.real)
        map = given.logits().masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num()
        share = _share(given.q, predictor.down.shape[1], budget, given.n_prefix)
        return Attended(gathered(map, given.v), {PLACE: places}, map=map, share=share)

    def _places(self, given: Attending, tokens: int) -> Tensor:
        """Returns which of the predictor's tokens each is, ``[B, S]`` int64.

        Raises:
            UnsupportedError: the image has another number of them.
        """
        if PLACE in given.tokens:
            return given.tokens[PLACE]
        batch, _, n, _ = given.q.shape
        if n != tokens:
            raise UnsupportedError(
                f"The predictors of sparsifiner know {tokens} tokens, but an image has {n}. Give "
                f"images of the size that they were trained on. {TRAIN}"
            )
        return torch.arange(n, device=given.q.device).expand(batch, n)


def _share(q: Tensor, landmarks: int, budget: int, n_prefix: int) -> float:
    """Returns the operations that count, those of the predictor too, by those of all pairs."""
    _, _, n, d = q.shape
    pairs = (min(n, n_prefix) * n + max(0, n - n_prefix) * min(budget, n)) / n
    guessing = d * d + d * landmarks + min(BASES, landmarks) * n  # per token
    return (2 * pairs * d + guessing) / (2 * n * d)


@dataclass(frozen=True)
class Sparsifiner(Strategy):
    """``layers`` are the blocks that attend so, by default all.

    ``predictors``: a file of them, a folder that holds it, the name of a shipped model, or
    themselves; by default those in the folder which the ViT was loaded from. ``seen``: the share
    of the keys that a query sees. ``rate``: the share of the patches that stays in each of the
    blocks ``at`` (0-based, of 12; mapped to other depths).
    """

    kind: ClassVar[Literal["compute"]] = "compute"
    scope: ClassVar[Scope] = "tile"
    trained: ClassVar[bool] = True

    predictors: str | nn.ModuleList | None = None
    seen: float = 0.25
    rate: float = 1.0
    at: tuple[int, ...] = (3, 6, 9)

    def __post_init__(self) -> None:
        for name, share in {"seen": self.seen, "rate": self.rate}.items():
            if not 0 < share <= 1:
                raise ConfigError(f"{name}={share} is no share; give one above 0 and up to 1.")
        if not self.at or any(type(i) is not int or not 0 <= i < 12 for i in self.at):
            raise ConfigError(f"at={self.at}: give blocks of a ViT of 12, from 0 to 11.")

    def beside(self, folder: str) -> Sparsifiner:
        if self.predictors is not None:
            return self
        return replace(self, predictors=PREDICTORS.beside(folder))

    def default_layers(self, facts: Facts) -> tuple[int, ...]:
        return tuple(range(facts.vision_layers))

    def check_budget(self, budget: Budget, facts: Facts) -> None:
        check_needs((Attention(),), facts, self.name)
        depth = len(PREDICTORS.load(self.predictors))
        if depth != facts.vision_layers:
            raise ConfigError(
                f"The predictors are for {depth} blocks; {facts.family} has {facts.vision_layers}. "
                f"{TRAIN}"
            )

    def plan(self, facts: Facts) -> tuple[Stage, ...]:
        return tuple(
            Stage(
                Site.ENCODER,
                self._needs(layer, facts),
                layer,
                before_mlp=True,
                attend=Sparse(layer, self.predictors, self.seen),
            )
            for layer in self.used_layers(facts)
        )

    def _needs(self, layer: int, facts: Facts) -> tuple[Need, ...]:
        if self.rate == 1 or not self._leaves(layer, facts.vision_layers):
            return (Attention(),)
        return Attention(), ClsRow(layer) if facts.has_cls else Received(layer)

    def counts(self, signals: Signals, budget: Budget) -> list[int]:
        inside = signals.inside
        n = signals.n
        if inside is not None and self._leaves(inside.layers[inside.stage], inside.depth):
            n = math.ceil(self.rate * n)
        return [n] * len(signals.tokens)

    def _leaves(self, layer: int, depth: int) -> bool:
        return layer in {min(round(i * depth / 12), depth - 1) for i in self.at}

    def score(self, signals: Signals) -> Tensor:
        return signals.stack(ClsRow, Received)[-1]
