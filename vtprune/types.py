"""The vocabulary of vtprune: budgets, sites, needs, signals, selections, strategies.

B rows (one unit of the budget's scope each), N candidate tokens, K kept tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import ClassVar, Literal

from torch import Tensor

from vtprune.attending import AttentionRule
from vtprune.budget import Budget, Keep, Scope
from vtprune.errors import ConfigError
from vtprune.evicting import Evictor
from vtprune.interventions import Intervention, Rule, SparsePrefill
from vtprune.kernels.topk_sorted import topk_sorted
from vtprune.needs import (
    Attended,
    Attention,
    ClsRow,
    DecoderNeed,
    EachHead,
    EachText,
    Facts,
    FirstState,
    Flow,
    Frames,
    Guidance,
    InstructionText,
    Joint,
    KeyNorm,
    Keys,
    LastFlow,
    LastRow,
    LayerKeys,
    Left,
    Likeness,
    Maps,
    Need,
    Normed,
    Patches,
    Quantity,
    Received,
    RowNeed,
    Spans,
    TextPeak,
    TextRows,
    TextState,
    Tile,
    TotalReceived,
    TowerNeed,
    Transition,
    Turned,
    ValueNorm,
    VisualRows,
    WideClsRow,
    WideKeys,
    check_needs,
)
from vtprune.rules import RowRule
from vtprune.selection import Mix, Selection
from vtprune.signals import Inside, Signals

__all__ = [
    "Attended",
    "Attention",
    "AttentionRule",
    "Budget",
    "ClsRow",
    "DecoderNeed",
    "EachHead",
    "EachText",
    "Facts",
    "FirstState",
    "Flow",
    "Frames",
    "Guidance",
    "Inside",
    "InstructionText",
    "Intervention",
    "Joint",
    "Keep",
    "KeyNorm",
    "Keys",
    "LastFlow",
    "LastRow",
    "LayerKeys",
    "Left",
    "Likeness",
    "Maps",
    "Mix",
    "Need",
    "Newlines",
    "Normed",
    "Patches",
    "Positions",
    "Quantity",
    "Received",
    "RowNeed",
    "RowRule",
    "Rule",
    "Scope",
    "Selection",
    "Signals",
    "Site",
    "Spans",
    "SparsePrefill",
    "Stage",
    "Strategy",
    "TextPeak",
    "TextRows",
    "TextState",
    "Tile",
    "TotalReceived",
    "TowerNeed",
    "Transition",
    "Turned",
    "ValueNorm",
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
class Stage:
    """One point where a strategy acts: ``needs`` are gathered, then its ``select`` is called.

    ``layer`` is the 0-based layer before which a stage inside the language model acts, or the block
    of the tower after which one inside the encoder does; None = the block that yields the features.
    With ``before_mlp`` it acts in that block, between attention and MLP. With ``proportional`` a
    token that was merged gets attention, in the blocks that follow, for all patches it stands for.
    With ``ahead`` (of ViTs) it acts at the start of that block, when it is known how tokens attend
    there: what leaves or merges does so in the attention map too, which is not computed again.
    It leaves so many ``times`` the budget, above 1 where a later stage has to come down to it; a
    function says what share it leaves, by the share that the strategy is to keep.
    ``positions`` are its own where they are not those of the strategy.
    With a ``rule`` nothing leaves: it says what visual rows compute in that layer, or what becomes
    of attention there. What stands in
    ``attend`` does so for the attention of that block, whatever leaves it, but not ``ahead``; its
    stage needs ``Attention``.
    With ``evict`` nothing leaves either, but for that layer's cache once the prompt is in it.
    """

    site: Site
    needs: tuple[Need, ...] = ()
    layer: int | None = None
    times: int | Callable[[float], float] = 1
    before_mlp: bool = False
    ahead: bool = False
    proportional: bool = False
    rule: Rule | None = None
    attend: AttentionRule | None = None
    positions: Positions | None = None
    evict: Evictor | None = None

    @property
    def lets_leave(self) -> bool:
        """Whether tokens may leave while the prompt is read."""
        return self.rule is None and self.evict is None

    @property
    def inside_block(self) -> bool:
        """Whether it acts before the MLP of its block."""
        return self.before_mlp or self.ahead

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
        exclude_sinks: of strategies that keep what attention inside the language model goes to:
            whether sinks, which draw it whatever they show, leave before all others there.
        kind: ``select`` keeps an exact count, ``adaptive`` counts of its own per row, ``exit`` all
            tokens of a sample or none, ``compute`` all, for which less is computed: its stages have
            rules, and it takes no ``keep``. ``cache`` keeps all while the prompt is read, and of
            each head an exact count from then on: its stages ``evict``.
        trained: whether it decides by weights that were trained for the very model.
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

    kind: ClassVar[Literal["select", "adaptive", "exit", "compute", "cache"]] = "select"
    positions: ClassVar[Positions] = "renumber"
    scope: ClassVar[Scope] = "image"
    newlines: ClassVar[Newlines] = "keep"
    acts_inside: ClassVar[bool] = False
    trained: ClassVar[bool] = False

    layers: tuple[int, ...] | None = field(default=None, kw_only=True)
    exclude_sinks: bool = field(default=False, kw_only=True)

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
            computes, last = self.kind in ("compute", "cache"), facts.decoder_layers - 1
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

    def guests(self, facts: Facts) -> Tensor | None:
        """Returns what a token of the strategy's own gets added before each block of a ViT.

        That token starts as a copy of [CLS], stands last in the prefix and leaves after the last
        block.

        Returns:
            ``[L, C]``, zeros for a second [CLS]; None = there is no such token, as for most.
        """
        return None

    def beside(self, folder: str) -> Strategy:
        """Returns it with the trained weights that it lacks, if any, from the model's folder."""
        return self

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
