"""What attention rows become in one layer of the language model, and what takes attention's place.

B prompts, n columns that enter a layer, H heads, M queries, K keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

from torch import Tensor

from vtprune.errors import ConfigError
from vtprune.needs import TowerNeed
from vtprune.rules import RowRule

Queries = Literal["text", "last", "visual", "all"]


@dataclass(frozen=True)
class Entering:
    """The tokens of prompts that enter a layer.

    Attributes:
        states: ``[B, n, D]``, padding anything.
        valid, visual, first: ``[B, n]`` bool: which are tokens, visual ones, and the first one.
        item: ``[B, n]`` int64, the image or video of a visual token among all of the call, else -1.
        values: what was needed of the tower, ``[B, n, ...]``, no number where there is no patch.
    """

    states: Tensor
    valid: Tensor
    visual: Tensor
    first: Tensor
    item: Tensor
    values: Mapping[TowerNeed, Tensor]


@dataclass(frozen=True)
class Keys:
    """The keys of a layer, those of decoded tokens among them; each ``[B, 1, 1, K]`` bool.

    Attributes:
        visual, first: which are of visual tokens, and of the prompt's first token.
        marks: those that were marked when the prompt was read, one for each kind.
    """

    visual: Tensor
    first: Tensor
    marks: tuple[Tensor, ...] = ()


class Editor(Protocol):
    """What marks tokens, and edits the rows that attend to them."""

    def mark(self, entering: Entering) -> tuple[Tensor, ...]:
        """Returns the tokens of a prompt that matter, ``[B, n]`` bool for each kind."""
        ...

    def edit(self, rows: Tensor, keys: Keys) -> Tensor:
        """Returns what attention rows become, ``[B, H, M, K]`` float32.

        Args:
            rows: likewise, attention, or before the softmax its logits: -inf where nothing is seen.
        """
        ...


@dataclass(frozen=True)
class Intervention:
    """Attention rows of some queries of a layer are edited, and their outputs made anew of them.

    All others, and those that come back as they were, stay what the model's own attention makes. A
    prompt without visual tokens is left alone.

    Attributes:
        editor: what edits them.
        queries: of which tokens of the prompt: of the ``text`` after the last visual one, of the
            ``last`` token, of ``visual`` ones or of ``all``.
        decoded: whether also of tokens decoded later, unless only of ``visual`` ones.
        before_softmax: whether logits are edited, in place of attention.
        heads: 0-based query heads; None = all.
        needs: what has to be read in the tower.
    """

    editor: Editor
    queries: Queries = "text"
    decoded: bool = True
    before_softmax: bool = False
    heads: tuple[int, ...] | None = None
    needs: tuple[TowerNeed, ...] = ()

    def __post_init__(self) -> None:
        if self.queries not in get_args(Queries):
            known = ", ".join(map(repr, get_args(Queries)))
            raise ConfigError(f"queries={self.queries!r} is unknown; choose one of {known}.")
        heads = () if self.heads is None else self.heads
        if any(type(h) is not int or h < 0 for h in heads) or len(set(heads)) < len(heads):
            raise ConfigError(f"heads={self.heads!r}: give distinct heads, from 0 on; None = all.")
        if self.heads == ():
            raise ConfigError("heads=() edits nothing; give at least one; None = all.")

    def __str__(self) -> str:
        rows = {"text": "the text after the image", "last": "the last token", "all": "all tokens"}
        heads = "" if self.heads is None else f" in {len(self.heads)} heads"
        return f"rows of {rows.get(self.queries, 'visual tokens')}{heads} edited by {self.editor}"


class Attender(Protocol):
    """What makes the attention of whole prompts."""

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, after: int
    ) -> tuple[Tensor, Tensor] | None:
        """Returns causal attention, and what share of it was computed, a float32 scalar.

        None = all of it, so that the model may do that by itself.

        Args:
            q: ``[1, H, n, d]`` of one prompt without padding; k, v: ``[1, Hkv, n, d]``.
            scale: factor of the logits; None = ``d ** -0.5``.
            after: how many of its tokens come after the last visual one.

        Returns:
            ``[1, H, n, d]`` in the dtype of ``v``, and the share.
        """
        ...


@dataclass(frozen=True)
class SparsePrefill:
    """While a prompt is read ``attender`` stands for the attention of a layer."""

    attender: Attender
    needs: tuple[TowerNeed, ...] = ()

    def __str__(self) -> str:
        return f"prompts attend by {self.attender}"


Rule = RowRule | Intervention | SparsePrefill


def together(one: Rule, other: Rule) -> bool:
    """Returns whether two rules may be of one layer: where each edits, or acts on, other rows."""
    if isinstance(one, Intervention) and isinstance(other, Intervention):
        return True
    edits = [rule for rule in (one, other) if isinstance(rule, Intervention)]
    rows = [rule for rule in (one, other) if isinstance(rule, RowRule)]
    if not edits or not rows:
        return False
    return rows[0].attend == "all" or (
        rows[0].attend != "chosen" and edits[0].queries in ("text", "last")
    )
