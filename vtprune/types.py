"""The vocabulary of vtprune: budgets, sites, needs, signals, selections, strategies.

B rows (one unit of the budget's scope each), N candidate tokens, K kept tokens, D width.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vtprune.errors import ConfigError, InputError
from vtprune.kernels.topk_sorted import topk_sorted
from vtprune.needs import (
    ClsRow,
    DecoderNeed,
    Facts,
    Flow,
    InstructionText,
    Joint,
    KeyNorm,
    Keys,
    LastRow,
    Need,
    Normed,
    Quantity,
    Received,
    TowerNeed,
    WideClsRow,
    WideKeys,
    check_needs,
)
from vtprune.selection import Mix, Selection

__all__ = [
    "Budget",
    "ClsRow",
    "DecoderNeed",
    "Facts",
    "Flow",
    "Inside",
    "InstructionText",
    "Joint",
    "Keep",
    "KeyNorm",
    "Keys",
    "LastRow",
    "Mix",
    "Need",
    "Newlines",
    "Normed",
    "Positions",
    "Quantity",
    "Received",
    "Selection",
    "Signals",
    "Site",
    "Stage",
    "Strategy",
    "TowerNeed",
    "WideClsRow",
    "WideKeys",
    "check_needs",
]

Keep = int | float
Positions = Literal["keep", "renumber"]
Newlines = Literal["keep", "row"]


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

    def split(self, lengths: Sequence[int]) -> list[Budget]:
        """Returns the budgets of parts of ``lengths``: a share is that of each, tokens are shared.

        Each part gets at least one token, as the whole does, and none more than it has.
        """
        if self.tokens is None:
            return [self] * len(lengths)
        total = sum(lengths)
        wanted = min(max(self.tokens, len(lengths)), total)
        exact = [wanted * n / total for n in lengths]
        counts = [max(1, math.floor(x)) for x in exact]
        by_rest = sorted(range(len(lengths)), key=lambda i: math.floor(exact[i]) - exact[i])
        for i in itertools.cycle(by_rest):
            if sum(counts) >= wanted:
                break
            counts[i] += counts[i] < lengths[i]
        return [Budget(tokens=count) for count in counts]

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
    DECODER = "decoder"  # before a layer of the language model


@dataclass(frozen=True)
class Inside:
    """Where in the language model, or between the blocks of the tower, a stage acts.

    Attributes:
        stage: 0-based number of the stage among those of its strategy.
        layers: 0-based layers before which the strategy's stages act; blocks after which.
        depth: number of layers or blocks.
        entered: per row the visual tokens that entered the language model, or the patches of a
            tile that are chosen from.
        starts: per row the tokens before the first visual one, if known.
        after: per row what is needed of the layers, at the tokens after the last visual one, each
            with leading dimension ``[M]``.
    """

    stage: int
    layers: tuple[int, ...]
    depth: int
    entered: tuple[int, ...]
    starts: tuple[int, ...] = ()
    after: tuple[Mapping[Quantity, Tensor], ...] = ()

    def of(self, rows: Sequence[int]) -> Inside:
        """Returns the same for some rows."""
        return replace(
            self,
            entered=tuple(self.entered[i] for i in rows),
            starts=tuple(self.starts[i] for i in rows if self.starts),
            after=tuple(self.after[i] for i in rows if self.after),
        )


@dataclass
class Signals:
    """What a strategy sees of a group of rows with the same number of tokens.

    Attributes:
        tokens: ``[B, N, D]`` candidate tokens where the stage acts.
        grid: ``(t, h, w)`` of the tokens, or None where they form none.
        item: ``[B]`` int64, the image that each row belongs to; None = one row per image. Inside
            the language model a row is a sample, all its images together.
        values: the needed quantities, each with leading dimensions ``[B, N]``.
        text: per row the instruction's embeddings ``[M, D]``, if asked for.
        inside: where a stage inside a model acts; None for the others.
        n_prefix: tokens of the tower, CLS first, that a mix may read as sources N, N + 1, ...
    """

    tokens: Tensor
    grid: tuple[int, int, int] | None = None
    item: Tensor | None = None
    values: Mapping[Quantity, Tensor] = field(default_factory=dict)
    text: Sequence[Tensor] | None = None
    inside: Inside | None = None
    n_prefix: int = 0

    @property
    def n(self) -> int:
        return self.tokens.shape[1]

    def stack(self, *kinds: type[Quantity]) -> Tensor:
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
            self.inside and self.inside.of(index.tolist()),
            self.n_prefix,
        )


@dataclass(frozen=True)
class Stage:
    """One point where a strategy acts: ``needs`` are gathered, then its ``select`` is called.

    ``layer`` is the 0-based layer before which a stage inside the language model acts, or the block
    of the tower after which one inside the encoder does; None = the block that yields the features.
    """

    site: Site
    needs: tuple[Need, ...] = ()
    layer: int | None = None

    @property
    def quantities(self) -> tuple[Quantity, ...]:
        """Those of ``needs`` that give a value per token."""
        return tuple(need for need in self.needs if isinstance(need, Quantity))

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
        layers: 0-based layers to use instead of the default, exactly as given: tower blocks to
            read, or layers of the language model before which to act.
        kind: ``select`` keeps an exact count, ``adaptive`` counts of its own per row.
        acts_inside: whether it acts inside the language model.
        positions: the authors' position ids for survivors: ``keep`` theirs, or ``renumber``.
        newlines: what becomes of tokens that end a row of a tiled image: they ``keep``, or leave
            with the last token of their ``row``. No budget counts them.
    """

    kind: ClassVar[Literal["select", "adaptive"]] = "select"
    positions: ClassVar[Positions] = "renumber"
    newlines: ClassVar[Newlines] = "keep"
    acts_inside: ClassVar[bool] = False

    layers: tuple[int, ...] | None = field(default=None, kw_only=True)

    @property
    def name(self) -> str:
        return type(self).__module__.rpartition(".")[2]

    def default_layers(self, facts: Facts) -> tuple[int, ...]:
        """Returns the 0-based layers used by default; none for most."""
        return ()

    def used_layers(self, facts: Facts) -> tuple[int, ...]:
        """Returns the layers used: ``layers`` as given, or the default.

        Raises:
            ConfigError: a layer out of range, or layers for a strategy that reads none.
        """
        default = self.default_layers(facts)
        if not self.acts_inside:
            default = tuple(sorted({facts.readable(block) for block in default}))
        if self.layers is None:
            return default
        if not default:
            raise ConfigError(f"{self.name} reads no layer; leave layers={self.layers} out.")
        allowed, what = self._allowed_layers(facts)
        bad = [i for i in self.layers if isinstance(i, bool) or i not in allowed]
        if bad or not self.layers or len(set(self.layers)) < len(self.layers):
            raise ConfigError(
                f"layers={self.layers}: {facts.family} has {what}; give distinct ones of them."
            )
        return tuple(sorted(self.layers))

    def _allowed_layers(self, facts: Facts) -> tuple[Sequence[int], str]:
        if self.acts_inside:
            first, last = facts.first_stage, facts.decoder_layers - 1
            return range(first, last + 1), f"decoder layers {first} to {last} to act before"
        last = facts.feature_block
        if facts.full_blocks is None:
            return range(last + 1), f"tower blocks 0 to {last} up to its features"
        full = [block for block in facts.full_blocks if block <= last]
        return full, f"tower blocks {full} with attention over the whole image"

    def needs(self, facts: Facts) -> tuple[Need, ...]:
        """Returns what the strategy reads besides the tokens."""
        return ()

    def plan(self, facts: Facts) -> tuple[Stage, ...]:
        """Returns the stages; here one after the projector."""
        self.used_layers(facts)
        return (Stage(Site.PROJECTOR, self.needs(facts)),)

    def check_budget(self, budget: Budget, facts: Facts) -> None:
        """Raises ConfigError for a budget that the strategy cannot reach on this model."""

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
