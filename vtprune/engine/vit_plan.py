"""Where in a ViT a strategy acts, and how many tokens each time leave."""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from vtprune.errors import ConfigError, InputError, UnsupportedError
from vtprune.types import (
    AttentionRule,
    Budget,
    Facts,
    Inside,
    Keep,
    Patches,
    Signals,
    Site,
    Stage,
    Strategy,
    TowerNeed,
    check_needs,
)
from vtprune.vit_adapters._base import ViTAdapter

Reduce = int | float | tuple[int, float] | Sequence[int]


@dataclass(frozen=True)
class Plan:
    """A strategy on a ViT.

    Attributes:
        stages: by block, 0-based and ascending.
        budget: of what stays in the end; ``removed``: tokens that leave, by block, in its place.
        depth: number of blocks.
        spread: whether the blocks share evenly what the budget takes away; or else the strategy
            counts.
    """

    strategy: Strategy
    stages: Mapping[int, Stage]
    budget: Budget
    depth: int
    removed: tuple[int, ...] | None = None
    spread: bool = False

    def stage(self, layer: int) -> Stage | None:
        """Returns what happens in a block."""
        return self.stages.get(layer)

    def rule(self, layer: int) -> AttentionRule | None:
        """Returns what stands for the attention of a block, whatever leaves in it."""
        stage = self.stages.get(layer)
        return None if stage is None else stage.attend

    def reads(self, layer: int, entered: int) -> list[TowerNeed]:
        """Returns what is read of a block, each once, for stages where something may leave."""
        busy = [s for i, s in self.stages.items() if not self._idle(i, entered)]
        found = dict.fromkeys(need for stage in busy for need in stage.tower_needs)
        return [need for need in found if need.layer == layer]

    def idle(self, entered: int) -> bool:
        """Whether nothing leaves anywhere, whatever the image, and no rule stands anywhere."""
        ruled = any(stage.attend is not None for stage in self.stages.values())
        return not ruled and all(self._idle(layer, entered) for layer in self.stages)

    def _idle(self, layer: int, entered: int) -> bool:
        """Whether nothing leaves in a block, whatever the image."""
        if self.removed is not None:
            return not self.removed[layer]
        return self.strategy.kind == "select" and self._budget(layer).count(entered) == entered

    def _budget(self, layer: int) -> Budget:
        return self.budget.times(self.stages[layer].times)

    def known(self, layer: int, n: int, entered: int) -> int | None:
        """Returns how many of ``n`` tokens a block leaves, None where that depends on the image.

        Args:
            entered: patches of an image.
        """
        if self._idle(layer, entered):
            return n
        if self.removed is not None:
            return n - min(self.removed[layer], n // 2)
        if self.spread:
            leaving = evenly(entered - self.budget.count(entered), list(self.stages))
            return min(n, entered - sum(gone for i, gone in leaving.items() if i <= layer))
        if self.strategy.kind == "adaptive":
            return None
        signals = Signals(torch.empty(1, n, 0), inside=self.inside(layer, entered, 1))
        try:
            return self.strategy.counts(signals, self._budget(layer))[0]
        except InputError:  # it counts by what is read of the image
            return None

    def counts(self, layer: int, signals: Signals) -> int | list[int]:
        """Returns how many tokens of each image a block leaves, one number where it is the same."""
        entered = signals.inside.entered[0] if signals.inside else signals.n
        known = self.known(layer, signals.n, entered)
        if known is not None:
            return known
        counts = self.strategy.counts(signals, self._budget(layer))
        return counts[0] if len(set(counts)) == 1 else counts

    def inside(self, layer: int, entered: int, batch: int) -> Inside | None:
        """Returns where a stage acts; None for one that acts once, on the output of all blocks."""
        layers = tuple(self.stages)
        if layers == (self.depth - 1,) and not self.stages[layer].inside_block:
            return None
        return Inside(layers.index(layer), layers, self.depth, (entered,) * batch)


def plan(
    strategy: Strategy,
    adapter: ViTAdapter,
    keep: Keep | None,
    reduce: Reduce | None,
    layers: Sequence[int] | None,
) -> Plan:
    """Returns where and how much ``strategy`` reduces.

    Raises:
        ConfigError: a number out of range, or not exactly one of ``keep`` and ``reduce``.
        UnsupportedError: a strategy that needs what a ViT alone has not.
    """
    facts = adapter.facts
    if strategy.kind in ("exit", "cache") or (strategy.kind == "compute" and strategy.acts_inside):
        raise UnsupportedError(
            f"{strategy.name} acts inside a language model; {facts.family} has none. Use a "
            "strategy that acts on patches, such as 'tome'."
        )
    if strategy.exclude_sinks:
        raise ConfigError(
            f"exclude_sinks=True: {facts.family} has no language model, whose sinks these are; "
            "leave it out."
        )
    if strategy.kind == "compute":
        if keep is not None or reduce is not None:
            raise ConfigError(
                f"keep={keep}, reduce={reduce}: no token leaves because of {strategy.name}, so it "
                "takes neither; its options say how much is computed."
            )
        keep = 1.0
    if (keep is None) == (reduce is None):
        given = "neither" if keep is None else "both"
        raise ConfigError(
            f"keep= and reduce=: {given} given. Give keep= (tokens that stay in the end, or their "
            "share) or reduce= (tokens that leave per block, or the share of operations saved)."
        )
    budget = Budget.of(1.0 if keep is None else keep)
    if facts.n_tokens is not None:
        budget.check(facts.n_tokens)
    layers = strategy.layers if layers is None else tuple(layers)
    strategy = replace(strategy, layers=None)
    spread = not _in_blocks(strategy.plan(facts))
    if spread:
        stages = _everywhere(strategy, facts, layers)
    else:
        strategy = replace(strategy, layers=layers)
        stages = {_block(stage, facts): stage for stage in strategy.plan(facts)}
    stages = dict(sorted(stages.items()))
    strategy.check_budget(budget, facts)
    for stage in stages.values():
        check_needs(stage.needs, facts, strategy.name)
    depth = facts.vision_layers
    if isinstance(reduce, float):
        return for_operations(reduce, adapter, Plan(strategy, stages, budget, depth, None, spread))
    removed = None if reduce is None else per_block(reduce, depth)
    return Plan(strategy, stages, budget, depth, removed, spread)


def _in_blocks(stages: Sequence[Stage]) -> bool:
    return all(stage.site is Site.ENCODER for stage in stages)


def _block(stage: Stage, facts: Facts) -> int:
    return facts.feature_block if stage.layer is None else stage.layer


def _everywhere(
    strategy: Strategy, facts: Facts, layers: tuple[int, ...] | None
) -> dict[int, Stage]:
    """Lets what would act once, after a projector, act in blocks, and read the one it acts in.

    Raises:
        UnsupportedError: it acts elsewhere, or reads more than a block has before its MLP.
    """
    stages = strategy.plan(facts)
    needs = stages[0].needs
    here = all(isinstance(need, TowerNeed) and not isinstance(need, Patches) for need in needs)
    if [stage.site for stage in stages] != [Site.PROJECTOR] or len(needs) > 1 or not here:
        raise UnsupportedError(
            f"{strategy.name} acts after a projector or inside a language model, reading "
            f"{', '.join(map(str, needs)) or 'tokens'}; {facts.family} has neither. Use a strategy "
            "that acts in blocks, such as 'tome', 'random' or 'strided'."
        )
    every = range(facts.vision_layers) if layers is None else _distinct(layers, facts)
    read = {i: tuple(replace(need, layer=i) for need in stages[0].tower_needs) for i in every}
    return {i: Stage(Site.ENCODER, read[i], i, before_mlp=True) for i in every}


def _distinct(layers: tuple[int, ...], facts: Facts) -> list[int]:
    blocks = range(facts.vision_layers)
    bad = [i for i in layers if isinstance(i, bool) or i not in blocks]
    if bad or not layers or len(set(layers)) < len(layers):
        raise ConfigError(f"layers={layers}: give distinct blocks from 0 to {blocks[-1]}.")
    return sorted(layers)


def evenly(total: int, layers: Sequence[int]) -> dict[int, int]:
    """Returns how many of ``total`` leave in each of ``layers``, the first ones one more."""
    each, rest = divmod(total, len(layers))
    return {layer: each + (i < rest) for i, layer in enumerate(layers)}


def for_operations(saved: float, adapter: ViTAdapter, plan: Plan) -> Plan:
    """Returns the plan that keeps most tokens of those that save a share of the operations.

    Raises:
        ConfigError: a share out of range, or one that cannot be reached or foreseen.
    """
    shape, n, prefix = adapter.shape, adapter.n_patches, adapter.n_prefix
    if not 0 < saved < 1 or n is None:
        raise ConfigError(
            f"reduce={saved}: a float is the share of operations that is saved, above 0 and below "
            "1, of images of one fixed size. Give one, or whole numbers of tokens."
        )
    if None in [plan.known(layer, n, n) for layer in plan.stages]:
        raise ConfigError(
            f"reduce={saved}: {plan.strategy.name} counts by the image, so what it saves is not "
            "known beforehand. Give keep=."
        )
    whole = shape.prefill([n + prefix] * shape.layers)

    def share(keep: int) -> float:
        ways = _ways(replace(plan, budget=Budget(tokens=keep)), n, prefix)
        return 1 - shape.prefill(*ways) / whole

    if share(1) < saved:
        raise ConfigError(
            f"reduce={saved}: blocks {list(plan.stages)} can save {share(1):.3g} at most."
        )
    most = bisect.bisect_left(range(n, 0, -1), saved, key=share)
    return replace(plan, budget=Budget(tokens=n - most))


def _ways(plan: Plan, n: int, n_prefix: int) -> tuple[list[int], list[int]]:
    """Returns how many tokens enter attention, and how many the MLP, of each block."""
    attended, passed, entered = [], [], n
    for layer in range(plan.depth):
        stage = plan.stage(layer)
        left = n if stage is None else plan.known(layer, n, entered) or n
        attended.append(n + n_prefix)
        passed.append((left if stage and stage.inside_block else n) + n_prefix)
        n = left
    return attended, passed


def per_block(reduce: Reduce, depth: int) -> tuple[int, ...]:
    """Returns how many tokens leave in each of ``depth`` blocks.

    Args:
        reduce: a whole number = as many in each; ``(r, inflection)`` = a ramp of that mean, from
            ``r * (1 - inflection)`` to ``r * (1 + inflection)``; a list = per block, 0 after it.

    Raises:
        ConfigError: none of these, or a number out of range.
    """
    if isinstance(reduce, list) and len(reduce) <= depth and all(map(_whole, reduce)):
        return (*reduce, *[0] * (depth - len(reduce)))
    if _whole(reduce):
        return (reduce,) * depth  # type: ignore[return-value]
    if isinstance(reduce, tuple) and len(reduce) == 2 and _whole(reduce[0]):
        r, inflection = reduce
        if isinstance(inflection, (int, float)) and math.isfinite(inflection):
            low = int(r * (1 - inflection))
            step = (2 * r - 2 * low) / max(1, depth - 1)
            if -1 <= inflection <= 1:
                return tuple(int(low + step * i) for i in range(depth))
    raise ConfigError(
        f"reduce={reduce!r} is not understood. Give a whole number of at least 0 (tokens that "
        "leave in every block), a tuple (number, inflection from -1 to 1) for a ramp, or a list "
        f"of up to {depth} numbers, one per block; or a float, the share of operations saved."
    )


def _whole(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number >= 0
