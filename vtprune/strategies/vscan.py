"""VScan: scan the image as a whole and window by window, then prune once inside the language model.

A shallow block's [CLS] attention picks the best of each window for half of the budget, a deep
block's the best of all others; tokens that leave are averaged into the most similar one that stays,
after the projector. Half-way through the language model the last prompt token's attention keeps a
third. arXiv 2505.22654 (Tencent/SelfEvolvingAgent). Without [CLS] attention received takes its
place, as the authors do for Qwen2.5-VL, with smaller windows that fill up the half. Where the
windows cannot share the half evenly the authors keep fewer tokens, which is ``compat``; here deep
attention fills up. Inside Qwen they rank without rotary embedding; here as elsewhere.
Defaults: official code.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from operator import mul
from typing import ClassVar, Literal

from torch import Tensor

from vtprune.errors import ConfigError
from vtprune.kernels.topk_sorted import topk_sorted
from vtprune.scoring.attention import salience_needs
from vtprune.scoring.hierarchy import take
from vtprune.scoring.merging import into_nearest
from vtprune.scoring.windows import best_of_each, windows
from vtprune.types import (
    Budget,
    ClsRow,
    Facts,
    LastRow,
    Received,
    Scope,
    Selection,
    Signals,
    Site,
    Stage,
    Strategy,
)


@dataclass(frozen=True)
class VScan(Strategy):
    """``layers`` are the shallow and the deep block, by default 5 of 24 and that of the features.

    ``keep`` is the mean number of an image's tokens that enter a layer of the language model; 3/2
    of it enter the first, and half of it is left before layer 16 of 32. ``inside``: whether tokens
    leave there; if not, all layers get ``keep``. ``compat`` keeps the authors' smaller count.
    """

    kind: ClassVar[Literal["adaptive"]] = "adaptive"
    scope: ClassVar[Scope] = "tile"

    inside: bool = True
    compat: bool = False

    def default_layers(self, facts: Facts) -> tuple[int, ...]:
        return facts.scale(5, 24), facts.feature_block

    def plan(self, facts: Facts) -> tuple[Stage, ...]:
        needs = salience_needs(self.used_layers(facts), facts)
        if not self.inside:
            return (Stage(Site.PROJECTOR, needs),)
        layer, depth = facts.scale_decoder(16, 32), facts.decoder_layers
        if depth <= facts.first_stage:
            raise ConfigError(
                f"inside=True: {facts.family} has no layer of its language model before which "
                "tokens may leave; give inside=False."
            )
        times = partial(mul, depth / (layer + (depth - layer) / 3))
        inside = Stage(Site.DECODER, (LastRow(layer),), layer)
        return Stage(Site.PROJECTOR, needs, times=times), inside

    def counts(self, signals: Signals, budget: Budget) -> list[int]:
        inside, n = signals.inside, signals.n
        if inside is None:
            k = budget.count(n)
            if self.compat and k < n and _has_cls(signals):
                n_windows = int(_windows(signals, 6)[-1]) + 1
                k += k // 2 // n_windows * n_windows - k // 2
            return [k] * len(signals.tokens)
        layer, depth = inside.layers[inside.stage], inside.depth
        means = [sum(map(budget.count, images)) for images in inside.images]
        # What makes up for all that entered the layers before.
        left = [(mean * depth - n * layer) / (depth - layer) for mean in means]
        return [max(1, min(n, round(count))) for count in left]

    def select(self, signals: Signals, k: int) -> Selection:
        if any(isinstance(need, LastRow) for need in signals.values):
            return Selection(topk_sorted(signals.stack(LastRow)[-1], k), signals.n)
        deep = signals.stack(ClsRow, Received)[-1]
        return into_nearest(take((~self.local(signals, k)).long(), deep, k), signals.tokens)

    def local(self, signals: Signals, k: int) -> Tensor:
        """Returns which of ``k`` tokens the windows pick, ``[B, N]`` bool, at most half of them."""
        shallow = signals.stack(ClsRow, Received)[0]
        has_cls = _has_cls(signals)
        group = _windows(signals, 6 if has_cls else 4)
        n_windows = int(group[-1]) + 1
        # ``k`` of ``compat`` has the same whole windows in its half as the budget.
        limit = k // (2 * n_windows) if has_cls else -(-(k // 2) // n_windows)
        return best_of_each(shallow, group, limit, k // 2)


def _has_cls(signals: Signals) -> bool:
    return any(isinstance(need, ClsRow) for need in signals.values)


def _windows(signals: Signals, side: int) -> Tensor:
    return windows(signals.n, signals.grid, side).to(signals.tokens.device)
