"""The vocabulary of vtprune: budgets, sites, needs, signals, selections, strategies.

B rows (one unit of the budget's scope each), N candidate tokens, K kept tokens, D width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vtprune.errors import ConfigError, InputError, UnsupportedError
from vtprune.kernels.gather_tokens import gather_tokens
from vtprune.kernels.segment_merge import segment_merge
from vtprune.kernels.topk_sorted import topk_sorted

Keep = int | float
Positions = Literal["keep", "renumber"]


@dataclass(frozen=True)
class Budget:
    """How many tokens stay: a whole number of ``tokens``, or a ``fraction`` of those there are."""

    tokens: int | None = None
    fraction: float | None = None

    def __post_init__(self) -> None:
        if (self.tokens is None) == (self.fraction is None):
            raise ConfigError("A budget is either tokens or a fraction; give exactly one.")

    @classmethod
    def of(cls, keep: Keep | Budget) -> Budget:
        """Reads ``keep``: an int is a token count, a float in (0, 1] a share.

        Raises:
            ConfigError: a bool, NaN, zero, a negative number, or a share above 1.
        """
        if isinstance(keep, Budget):
            return keep
        allowed = "a token count of at least 1, or a share above 0.0 and up to 1.0"
        if isinstance(keep, bool) or not isinstance(keep, (int, float)):
            raise ConfigError(f"keep={keep!r} is not a budget; give {allowed}.")
        if isinstance(keep, int):
            if keep < 1:
                raise ConfigError(f"keep={keep} keeps nothing; give {allowed}.")
            return cls(tokens=keep)
        if not (math.isfinite(keep) and 0 < keep <= 1):
            raise ConfigError(f"keep={keep} is not a share; give {allowed}.")
        return cls(fraction=keep)

    def count(self, n: int) -> int:
        """Returns the number of tokens kept of ``n``: at least 1 and at most ``n``."""
        wanted = self.tokens if self.tokens is not None else round((self.fraction or 0) * n)
        return max(1, min(wanted, n))

    def check(self, n: int) -> None:
        """Raises ConfigError when more tokens are asked for than the ``n`` there always are."""
        if self.tokens is not None and self.tokens > n:
            raise ConfigError(
                f"keep={self.tokens}, but an image has {n} tokens. Give at most {n}, or a share."
            )


class Site(Enum):
    """Where a stage acts."""

    ENCODER = "encoder"  # on the output of a block of the vision tower
    PROJECTOR = "projector"  # after the projector, before the language model


class Need:
    """Something that a strategy reads besides the tokens."""


@dataclass(frozen=True)
class TowerNeed(Need):
    """A quantity of tower block ``layer`` (0-based), reduced while that block runs."""

    layer: int


class ClsRow(TowerNeed):
    """Attention of the CLS query to each patch, mean over heads. ``[B, N]`` float32.

    The softmax runs over all keys, CLS included.
    """


class Received(TowerNeed):
    """Attention that each patch receives. ``[B, N]`` float32.

    Mean over heads and over all queries, CLS among them.
    """


class Keys(TowerNeed):
    """Mean over heads of the keys of each patch. ``[B, N, d]`` float32."""


@dataclass(frozen=True)
class InstructionText(Need):
    """Language-model embeddings of the instruction's words; ``Signals.text`` holds them."""


@dataclass(frozen=True)
class Facts:
    """What a strategy may know of a model before it runs.

    Attributes:
        vision_layers: number of blocks in the vision tower.
        feature_block: 0-based block whose output is projected.
        has_cls: whether the tower has a CLS token (index 0 of its sequence).
        signals: the kinds of needs that the adapter can give.
        n_tokens: visual tokens of every image, or None where they depend on the image.
        family: name used in messages.
    """

    vision_layers: int
    feature_block: int
    has_cls: bool
    signals: frozenset[type]
    n_tokens: int | None = None
    family: str = "this model"

    @staticmethod
    def signals_of(*, cls_row: bool) -> frozenset[type]:
        """Returns the signals of an ordinary tower, with or without a CLS token."""
        kinds = {Received, Keys, InstructionText}
        return frozenset(kinds | {ClsRow} if cls_row else kinds)

    def scale(self, layer: int, depth: int) -> int:
        """Maps block ``layer`` of a tower with ``depth`` blocks to this tower."""
        return min(round(layer * self.vision_layers / depth), self.vision_layers - 1)


@dataclass
class Signals:
    """What a strategy sees of a group of rows with the same number of tokens.

    Attributes:
        tokens: ``[B, N, D]`` candidate tokens where the stage acts.
        grid: ``(t, h, w)`` of the tokens, or None where they form none.
        item: ``[B]`` int64, the image that each row belongs to; None = one row per image.
        values: the needed quantities, each with leading dimensions ``[B, N]``.
        text: per row the instruction's embeddings ``[M, D]``, if asked for.
    """

    tokens: Tensor
    grid: tuple[int, int, int] | None = None
    item: Tensor | None = None
    values: Mapping[TowerNeed, Tensor] = field(default_factory=dict)
    text: Sequence[Tensor] | None = None

    @property
    def n(self) -> int:
        return self.tokens.shape[1]

    def stack(self, *kinds: type[TowerNeed]) -> Tensor:
        """Returns all quantities of these kinds, stacked in layer order: ``[L, B, N, ...]``.

        Raises:
            InputError: there is none.
        """
        found = [(need.layer, v) for need, v in self.values.items() if isinstance(need, kinds)]
        if not found:
            names = " or ".join(kind.__name__ for kind in kinds)
            have = ", ".join(map(str, self.values)) or "none"
            raise InputError(f"The signals hold no {names}; they hold: {have}.")
        found.sort(key=lambda pair: pair[0])
        return torch.stack([value for _, value in found])

    def rows(self, index: Tensor) -> Signals:
        """Returns the signals of some rows; ``index`` ``[b]`` int64."""
        return Signals(
            self.tokens[index],
            self.grid,
            None if self.item is None else self.item[index],
            {need: value[index] for need, value in self.values.items()},
            None if self.text is None else [self.text[i] for i in index.tolist()],
        )


@dataclass(frozen=True)
class Mix:
    """Sparse weights: edge e adds ``weight[b, e] * x[b, source[b, e]]`` to output ``target[b, e]``.

    ``source``, ``target``: ``[B, E]`` int64; ``weight``: ``[B, E]`` float32. Sources from N on are
    the tower's prefix tokens (CLS first).
    """

    source: Tensor
    target: Tensor
    weight: Tensor


@dataclass(frozen=True)
class Selection:
    """Which of N tokens stay, and what each output is made of.

    Attributes:
        rows: ``[B, K]`` int64, source position whose slot and position id each output takes;
            -1 = a new row, which takes the first free slot.
        n: number of source tokens.
        mix: what each output is made of; None = a copy of its source.
    """

    rows: Tensor
    n: int
    mix: Mix | None = None

    @classmethod
    def all(cls, batch: int, n: int, device: torch.device) -> Selection:
        """Keeps everything."""
        return cls(torch.arange(n, device=device).expand(batch, n), n)

    @property
    def is_identity(self) -> bool:
        """Whether everything stays as it is (strategies are not asked when all tokens stay)."""
        return self.mix is None and self.rows.shape[1] == self.n

    @property
    def slots(self) -> Tensor:
        """``[B, K]`` int64: ``rows`` with each -1 replaced by the lowest free source position."""
        if self.mix is None:  # only a mix can make new rows
            return self.rows
        new = self.rows < 0
        order = torch.arange(self.n, device=self.rows.device)
        taken = torch.zeros(len(self.rows), self.n + 1, device=self.rows.device, dtype=torch.bool)
        taken.scatter_(1, torch.where(new, self.n, self.rows), True)
        free = torch.where(taken[:, : self.n], self.n, order).sort(dim=1).values
        nth = (new.cumsum(1) - 1).clamp(min=0)
        return torch.where(new, free.gather(1, nth), self.rows)

    def apply(self, x: Tensor) -> Tensor:
        """Returns the outputs ``[B, K, ...]`` made of ``x`` ``[B, N (+ prefix), ...]``."""
        if self.mix is None:
            return gather_tokens(self.rows, x)[0]
        mix = self.mix
        return segment_merge(x, mix.source, mix.target, mix.weight, self.rows.shape[1])

    def row(self, b: int) -> Selection:
        """Returns the selection of row ``b`` alone, still with a batch dimension of 1."""
        mix = self.mix
        if mix is not None:
            mix = Mix(mix.source[b : b + 1], mix.target[b : b + 1], mix.weight[b : b + 1])
        return Selection(self.rows[b : b + 1], self.n, mix)


@dataclass(frozen=True)
class Stage:
    """One point where a strategy acts: ``needs`` are gathered, then its ``select`` is called."""

    site: Site
    needs: tuple[Need, ...] = ()

    @property
    def tower_needs(self) -> tuple[TowerNeed, ...]:
        """Those of ``needs`` that the vision tower gives."""
        return tuple(need for need in self.needs if isinstance(need, TowerNeed))

    @property
    def reads_text(self) -> bool:
        return any(isinstance(need, InstructionText) for need in self.needs)


@dataclass(frozen=True)
class Strategy:
    """Base of all strategies. Fields are hyper-parameters; most write only ``score``.

    Attributes:
        layers: 0-based tower blocks to read instead of the default; used as given.
        kind: ``select`` keeps an exact count, ``adaptive`` counts of its own per row.
        positions: the authors' position ids for survivors: ``keep`` theirs, or ``renumber``.
    """

    kind: ClassVar[Literal["select", "adaptive"]] = "select"
    positions: ClassVar[Positions] = "renumber"

    layers: tuple[int, ...] | None = field(default=None, kw_only=True)

    @property
    def name(self) -> str:
        return type(self).__module__.rpartition(".")[2]

    def default_layers(self, facts: Facts) -> tuple[int, ...]:
        """Returns the 0-based tower blocks read by default; none for most."""
        return ()

    def used_layers(self, facts: Facts) -> tuple[int, ...]:
        """Returns the blocks read: ``layers`` as given, or the default.

        Raises:
            ConfigError: a layer out of range, or layers for a strategy that reads none.
        """
        default = self.default_layers(facts)
        if self.layers is None:
            return default
        if not default:
            raise ConfigError(f"{self.name} reads no layer; leave layers={self.layers} out.")
        last = facts.feature_block
        bad = [i for i in self.layers if isinstance(i, bool) or not 0 <= i <= last]
        if bad or not self.layers or len(set(self.layers)) < len(self.layers):
            raise ConfigError(
                f"layers={self.layers}: {facts.family} has blocks 0 to {last} up to its features; "
                "give distinct ones of them."
            )
        return tuple(sorted(self.layers))

    def needs(self, facts: Facts) -> tuple[Need, ...]:
        """Returns what the strategy reads besides the tokens."""
        return ()

    def plan(self, facts: Facts) -> tuple[Stage, ...]:
        """Returns the stages; here one after the projector."""
        self.used_layers(facts)
        return (Stage(Site.PROJECTOR, self.needs(facts)),)

    def score(self, signals: Signals) -> Tensor:
        """Returns scores ``[B, N]``, higher = kept."""
        raise NotImplementedError(f"{type(self).__name__} must define score() or select().")

    def counts(self, signals: Signals, budget: Budget) -> list[int]:
        """Returns how many tokens of each row stay; an ``adaptive`` strategy overrides this."""
        return [budget.count(signals.n)] * len(signals.tokens)

    def select(self, signals: Signals, k: int) -> Selection:
        """Returns the selection of exactly ``k`` < N tokens per row, ascending."""
        return Selection(topk_sorted(self.score(signals), k), signals.n)

    @classmethod
    def options(cls) -> tuple[str, ...]:
        """Names of the hyper-parameters."""
        return tuple(f.name for f in fields(cls))


def check_needs(needs: Sequence[Need], facts: Facts, name: str) -> None:
    """Raises UnsupportedError when the model cannot give one of ``needs``."""
    for need in needs:
        if type(need) not in facts.signals:
            have = ", ".join(sorted(kind.__name__ for kind in facts.signals)) or "no signal"
            raise UnsupportedError(
                f"{name} needs {need}; {facts.family} gives only {have}. Use a strategy that needs "
                "no such signal, such as 'divprune' or 'random'."
            )
