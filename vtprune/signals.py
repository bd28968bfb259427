"""What a strategy is shown: candidate tokens, quantities read about them, and where it acts.

B rows (one unit of the budget's scope each), N candidate tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from vtprune.budget import Budget
from vtprune.errors import InputError
from vtprune.needs import Quantity


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
        budget: what was asked for, before counts were made of it; None = ``k`` says it.
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
    budget: Budget | None = None
    groups: Sequence[Signals] = field(default=(), repr=False, compare=False)

    @property
    def n(self) -> int:
        return self.tokens.shape[1]

    @property
    def share(self) -> float | None:
        """What share of the tokens was asked for; None = ``k`` says it."""
        return None if self.budget is None else self.budget.share(self.n)

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
            self.budget,
            self.groups,
        )
