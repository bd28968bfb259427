"""The vocabulary of vtprune: budgets, sites, needs, signals, selections, strategies.

B rows (one unit of the budget's scope each), N candidate tokens, K kept tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vtprune.budget import Budget, Keep, Scope
from vtprune.errors import ConfigError, InputError
from vtprune.kernels.topk_sorted import topk_sorted
from vtprune.needs import (
    ClsRow,
    DecoderNeed,
    EachHead,
    EachText,
    Facts,
    Flow,
    InstructionText,
    Joint,
    KeyNorm,
    Keys,
    LastFlow,
    LastRow,
    LayerKeys,
    Likeness,
    Need,
    Normed,
    Quantity,
    Received,
    RowNeed,
    TextRows,
    TextState,
    TowerNeed,
    Transition,
    Turned,
    VisualRows,
    WideClsRow,
    WideKeys,
    check_needs,
)
from vtprune.rules import RowRule
from vtprune.selection import Mix, Selection

__all__ = [
    "Budget",
    "ClsRow",
    "DecoderNeed",
    "EachHead",
    "EachText",
    "Facts",
    "Flow",
    "Inside",
    "InstructionText",
    "Joint",
    "Keep",
    "KeyNorm",
    "Keys",
    "LastFlow",
    "LastRow",
    "LayerKeys",
    "Likeness",
    "Mix",
    "Need",
    "Newlines",
    "Normed",
    "Positions",
    "Quantity",
    "Received",
    "RowNeed",
    "RowRule",
    "Scope",
    "Selection",
    "Signals",
    "Site",
    "Stage",
    "Strategy",
    "TextRows",
    "TextState",
    "TowerNeed",
    "Transition",
    "Turned",
    "VisualRows",
    "WideClsRow",
    "WideKeys",
    "check_needs",
]

Positions = Literal["keep", "renumber"]
Newlines = Literal["keep", "row"]


class Site(Enum):
    """Where a stage acts."""

    ENCODER = "encoder"  # in a block of the vision tower, or on its output
    PROJECTOR = "projector"  # after the projector, before the language model
    DECODER = "decoder"  # before a layer of the language model


@dataclass(frozen=True)
class Inside:
    """Where in the language model, or between the blocks of the tower, a stage acts.

    Attributes:
        stage: 0-based number of the stage among those of its strategy.
        layers: 0-based layers before which the strategy's stages act; blocks after or in which.
        depth: number of layers or blocks.
        entered: per row the visual tokens that entered the language model, or the patches of a
            tile that are chosen from.
        starts: per row the tokens before the first visual one, if known.
        after: per row what is needed of the layers, at the tokens after the last visual one, each
            with leading dimension ``[M]``.
        images: per row the tokens made of patches of each of its images, before any left; empty
            between the blocks of the tower.
    """

    stage: int
    layers: tuple[int, ...]
    depth: int
    entered: tuple[int, ...]
    starts: tuple[int, ...] = ()
    after: tuple[Mapping[Quantity, Tensor], ...] = ()
    images: tuple[tuple[int, ...], ...] = ()

    def of(self, rows: Sequence[int]) -> Inside:
        """Returns the same for some rows."""
        return replace(
            self,
            entered=tuple(self.entered[i] for i in rows),
            starts=tuple(self.starts[i] for i in rows if self.starts),
            after=tuple(self.after[i] for i in rows if self.after),
            images=tuple(self.images[i] for i in rows if self.images),
        )


@dataclass
class Signals:
    """What a strategy sees of a group of rows with the same number of tokens.

    Attributes:
        tokens: ``[B, N, D]`` candidate tokens where the stage acts.
        grid: ``(t, h, w)`` of the tokens, or None where they form none.
        item: ``[B]`` int64, the image that each row belongs to, of which it may be a tile; None =
            one row per image. Where a row is a sample, all its images together, the sample.
        values: the needed quantities, each with leading dimensions ``[B, N]``; those of a whole
            row ``[B]``.
        text: per row the instruction's embeddings ``[M, D]``, if asked for.
        inside: where a stage inside a model acts; None for the others.
        n_prefix: tokens of the tower before the first, CLS among them. A mix on the block that
            yields the features may read them as sources N, N + 1, ...
        size: ``[B, N]`` float32, how many patches each token stands for between the blocks of the
            tower; None = one each.
        groups: all rows of the call, those of equal N and budget together, so that statistics can
            be over all tiles of an image; empty = the rows here are all.
    """

    tokens: Tensor
    grid: tuple[int, int, int] | None = None
    item: Tensor | None = None
    values: Mapping[Quantity, Tensor] = field(default_factory=dict)
    text: Sequence[Tensor] | None = None
    inside: Inside | None = None
    n_prefix: int = 0
    size: Tensor | None = None
    groups: Sequence[Signals] = field(default=(), repr=False, compare=False)

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
            None if self.size is None else self.size[index],
            self.groups,
        )


@dataclass(frozen=True)
class Stage:
    """One point where a strategy acts: ``needs`` are gathered, then its ``select`` is called.

    ``layer`` is the 0-based layer before which a stage inside the language model acts, or the block
    of the tower after which one inside the encoder does; None = the block that yields the features.
    With ``before_mlp`` it acts in that block, between attention and MLP. With ``proportional`` a
    token that was merged gets attention, in the blocks that follow, for all patches it stands for.
    It leaves so many ``times`` the budget, above 1 where a later stage has to come down to it; a
    function says what share it leaves, by the share that the strategy is to keep.
    With a ``rule`` nothing leaves: it says what visual rows compute in that layer.
    """

    site: Site
    needs: tuple[Need, ...] = ()
    layer: int | None = None
    times: int | Callable[[float], float] = 1
    before_mlp: bool = False
    proportional: bool = False
    rule: RowRule | None = None

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
        kind: ``select`` keeps an exact count, ``adaptive`` counts of its own per row, ``exit`` all
            tokens of a sample or none, ``compute`` all, for which less is computed: its stages have
            rules, and it takes no ``keep``.
        acts_inside: whether all it does is inside the language model, where ``keep`` counts the
            visual tokens of a sample. A stage there of another strategy has whole images counted
            and chooses from tokens made of patches.
        positions: the authors' position ids for survivors: ``keep`` theirs, or ``renumber``.
        scope: what competes for one budget, by the authors: the tokens of a ``tile`` or frame, of
            an ``image`` or video, or of all in a ``sample``. Inside the vision tower it is always
            the tile, inside the language model the sample. An image is one tile where its tokens
            are made of several, and where fewer stay than it has tiles.
        newlines: what becomes of tokens that end a row of a tiled image: they ``keep``, or leave
            with the last token of their ``row``. No budget counts them.
    """

    kind: ClassVar[Literal["select", "adaptive", "exit", "compute"]] = "select"
    positions: ClassVar[Positions] = "renumber"
    scope: ClassVar[Scope] = "image"
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
            computes, last = self.kind == "compute", facts.decoder_layers - 1
            first = 0 if computes else facts.first_stage
            where = "in" if computes else "before"
            return range(first, last + 1), f"decoder layers {first} to {last} to act {where}"
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
        """Returns how many tokens of each row stay; an ``adaptive`` strategy overrides this.

        0 only inside the language model: there all visual tokens of a sample may leave.
        """
        return [budget.count(signals.n)] * len(signals.tokens)

    def select(self, signals: Signals, k: int) -> Selection:
        """Returns the selection of exactly ``k`` < N tokens per row, ascending."""
        return Selection(topk_sorted(self.score(signals), k), signals.n)

    @classmethod
    def options(cls) -> tuple[str, ...]:
        """Names of the hyper-parameters."""
        return tuple(f.name for f in fields(cls))
