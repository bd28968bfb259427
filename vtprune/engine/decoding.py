"""What is known of a prompt while the language model runs on it and on what comes after."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from vtprune.engine.compaction import Prompt, of_patches
from vtprune.engine.cuts import Cut
from vtprune.engine.held import Held
from vtprune.engine.items import Item
from vtprune.engine.places import places, spans, spread
from vtprune.engine.report import StageReport
from vtprune.engine.split import Split
from vtprune.types import Quantity, RowNeed


@dataclass
class Decoding:
    """One prompt on its way through the language model, and the tokens decoded after it.

    Attributes:
        valid, visual: ``[B, L]`` bool, columns of the prompt that are tokens, and visual ones.
        patches: ``[B, L]`` bool, visual ones that are made of patches.
        images: per prompt those of each of its images, before any left.
        cuts: by layer, what is left from that layer on.
        rows: what was read, ``[B, L, ...]`` over the columns of the prompt; of a whole row
            ``[B, ...]``. What the tower gave is no number where there is no patch.
        left: what the stages did, for the report.
        where: returns the place of each token as ``near`` takes it, ``[B, L, 4]``.
        spans: returns what each token is made of, ``[B, L, 3]`` as ``Spans`` has it.
        splits: by layer of the cut, -1 before any, which rows are visual.
        windows: by that layer and a radius, which tokens are close to each other.
        acted: layers in which a rule changed attention.
        chosen: by layer, the tokens that attention was computed for.
        held: by layer its cache, where that is not simply what the layer saw.
        whose: returns of which item each token is, ``[b, L]`` of b prompts, -1 = of none.
        marks: by layer, and for each intervention there, ``[B, L]`` marks of the prompt's tokens.
        densities: by layer what share of attention was computed, ``[B]``.
        leaving: by layer what is to leave its cache, until its attention is done.
        caches: what caches hold of visual tokens, per layer and prompt, for the report.
        spared: multiply-accumulates of the prompt that row rules left out.
    """

    valid: Tensor
    visual: Tensor
    patches: Tensor
    images: Sequence[Sequence[int]]
    copies: int = 1
    cuts: dict[int, Cut] = field(default_factory=dict)
    rows: dict[Quantity, Tensor] = field(default_factory=dict)
    left: list[StageReport] = field(default_factory=list)
    prefilled: bool = False
    where: Callable[[], Tensor] | None = None
    spans: Callable[[], Tensor] | None = None
    splits: dict[int, Split] = field(default_factory=dict)
    windows: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    acted: set[int] = field(default_factory=set)
    chosen: dict[int, Cut] = field(default_factory=dict)
    held: dict[int, Held] = field(default_factory=dict)
    leaving: dict[int, Any] = field(default_factory=dict)
    caches: list[StageReport] = field(default_factory=list)
    spared: float = 0.0
    whose: Callable[[], Tensor] | None = None
    marks: dict[int, list[tuple[Tensor, ...]]] = field(default_factory=dict)
    densities: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        prompt: Prompt,
        visual: Tensor,
        items: Sequence[Item],
        features: Mapping[Quantity, Sequence[Tensor]],
    ) -> Decoding:
        """Returns what begins a call.

        Args:
            visual: ``[B, L]`` bool, the tokens of ``items``.
            features: what was read in the tower of those that are left, ``[n_i, C]`` per item.
        """
        index = prompt.index.clamp(min=0)
        valid = (prompt.index >= 0) & prompt.valid.gather(1, index)
        seen, patches = (
            valid & mark.gather(1, index) for mark in (visual, of_patches(prompt.ids, items))
        )
        images: list[list[int]] = [[] for _ in prompt.ids]
        for row, item in zip(prompt.sample, items, strict=True):
            images[row].append(len(item.free))
        decoding = cls(valid, seen, patches, images)
        ids = prompt.ids.gather(1, index).masked_fill(~seen, -1)
        for need, values in features.items():
            wide = [value.reshape(len(value), -1) for value in values]
            decoding.rows[need] = spread(wide, ids, items, torch.nan)
        rows = torch.arange(len(index), device=index.device)[:, None]
        decoding.where = cache(lambda: places(prompt.ids, items)[rows, index])
        made = prompt.sample, prompt.selections
        decoding.spans = lambda: spans(prompt.ids, items, *made)[rows, index]
        owners = [torch.full((len(item), 1), i) for i, item in enumerate(items)]
        decoding.whose = cache(lambda: spread(owners, prompt.ids, items, -1)[rows, index, 0])
        return decoding

    def expand(self, batch: int) -> None:
        """Repeats every row as ``generate`` does for beams and several sequences per prompt."""
        self.copies = batch // len(self.valid)
        masks = (self.valid, self.visual, self.patches)
        self.valid, self.visual, self.patches = (
            mask.repeat_interleave(self.copies, dim=0) for mask in masks
        )
        for need, value in self.rows.items():
            self.rows[need] = value.repeat_interleave(self.copies, dim=0)

    def finish(self) -> None:
        """Says that the prompt was read, and forgets what only that took."""
        self.prefilled, self.where, self.spans, self.whose = True, None, None, None
        self.splits, self.windows = {}, {}

    def on(self, device: torch.device) -> Decoding:
        """Moves everything to the device of the layer that runs now."""
        if self.valid.device != device:
            masks = (self.valid, self.visual, self.patches)
            self.valid, self.visual, self.patches = (mask.to(device) for mask in masks)
            self.cuts = {layer: cut.to(device) for layer, cut in self.cuts.items()}
            self.rows = {need: value.to(device) for need, value in self.rows.items()}
        return self

    def move(self, row: int, source: Tensor, target: Tensor) -> None:
        """Lets what was read of columns ``[K]`` of a row follow the tokens to others."""
        if not torch.equal(source, target):
            for need, value in self.rows.items():
                if not isinstance(need, RowNeed):
                    value[row, target] = value[row, source]

    def at(self, need: Quantity, row: int, columns: Tensor) -> Tensor:
        """Returns what was read of these columns ``[K]`` of a row, or of the row as a whole."""
        value = self.rows[need][row]
        return value if isinstance(need, RowNeed) else value[columns]

    def cut(self, layer: int) -> Cut | None:
        """What ``layer`` still sees; None = everything."""
        before = [at for at in self.cuts if at <= layer]
        return self.cuts[max(before)] if before else None

    def cached(self, layer: int) -> Cut | None:
        """What the cache of ``layer`` holds of what it is done with; None = everything."""
        held = self.held.get(layer)
        return self.cut(layer) if held is None else held.cut

    def final(self) -> Cut | None:
        return self.cut(max(self.cuts, default=0))
