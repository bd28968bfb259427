"""DynamicViT: three small trained heads say which patches leave, before the blocks 3, 6 and 9.

Each judges a patch by itself and by the mean of those that are still there, and the same share of
these leaves at each. arXiv 2106.02034 (raoyongming/DynamicViT). ``vtprune train dynamicvit`` makes
heads for a ViT, whose own weights stay, where the authors train it along with them. Patches stay in
the order of the image, and not in that of their scores as in that code. Defaults: official code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, cast

from torch import Tensor, nn

from vtprune.errors import ConfigError, InputError, UnsupportedError
from vtprune.scoring.keeping import Keeper
from vtprune.trained import Modules
from vtprune.types import Budget, Facts, Scope, Signals, Site, Stage, Strategy

BEFORE = (3, 6, 9)  # of 12 blocks, 0-based


def _keeper(tensors: Mapping[str, Tensor]) -> Keeper:
    return Keeper(len(tensors["norm.weight"]))


TRAIN = "Train some with 'vtprune train dynamicvit --model ... --out FILE' and give them."
KEEPERS = Modules("keepers", "dynamicvit.safetensors", TRAIN, _keeper)


@dataclass(frozen=True)
class DynamicViT(Strategy):
    """``layers`` are the blocks after which patches leave, one for each of the trained heads.

    ``keepers``: a file of these heads, a folder that holds it, the name of a shipped model, or
    themselves; by default those in the folder which the model was loaded from.
    """

    scope: ClassVar[Scope] = "tile"
    trained: ClassVar[bool] = True

    keepers: str | nn.ModuleList | None = None

    def beside(self, folder: str) -> DynamicViT:
        return self if self.keepers is not None else replace(self, keepers=KEEPERS.beside(folder))

    def default_layers(self, facts: Facts) -> tuple[int, ...]:
        last = facts.feature_block - 1
        return tuple(sorted({max(0, min(facts.scale(i, 12) - 1, last)) for i in BEFORE}))

    def plan(self, facts: Facts) -> tuple[Stage, ...]:
        if not facts.in_tower:
            raise UnsupportedError(
                f"{self.name} lets patches leave inside the tower, which that of {facts.family} "
                "does not allow. Use a strategy that acts after it, such as 'divprune'."
            )
        return tuple(Stage(Site.ENCODER, (), layer) for layer in self.used_layers(facts))

    def check_budget(self, budget: Budget, facts: Facts) -> None:
        layers = [stage.layer for stage in self.plan(facts)]
        found = len(KEEPERS.load(self.keepers))
        if found != len(layers):
            raise ConfigError(
                f"The keepers are {found} heads, but patches leave after {len(layers)} blocks: "
                f"{layers}. Give as many layers=, or other keepers. {TRAIN}"
            )

    def counts(self, signals: Signals, budget: Budget) -> list[int]:
        inside = signals.inside
        if inside is None:
            return super().counts(signals, budget)
        done = (inside.stage + 1) / len(inside.layers)
        return [min(signals.n, _left(n, budget.count(n), done)) for n in inside.entered]

    def score(self, signals: Signals) -> Tensor:
        keepers = KEEPERS.load(self.keepers, signals.tokens.device)
        keeper = cast(Keeper, keepers[0 if signals.inside is None else signals.inside.stage])
        width = keeper.norm.normalized_shape[0]
        if signals.tokens.shape[-1] != width:
            raise InputError(
                f"The heads of dynamicvit judge states of {width} values, but these have "
                f"{signals.tokens.shape[-1]}: they are of another model. {TRAIN}"
            )
        return keeper(signals.tokens)[..., 0].nan_to_num(nan=-float("inf"))


def _left(n: int, k: int, done: float) -> int:
    """Returns how many of ``n`` are left after a part of the stages, ``k`` after all of them."""
    return k if done == 1 else max(k, int(n * (k / n) ** done + 1e-6))
