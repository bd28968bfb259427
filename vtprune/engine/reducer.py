"""Steps inside the vision tower: on the block that yields the features, or on the way to it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vtprune.engine.blocks import Blocks
from vtprune.engine.items import Item, join, n_patches, sources
from vtprune.engine.signals import Images, Step, decide, left_of, refuse_orphans
from vtprune.engine.tap import Tap
from vtprune.engine.timing import timed
from vtprune.engine.tower import Climb
from vtprune.errors import HookError, UnsupportedError
from vtprune.types import Budget, Joint, Selection, TowerNeed
from vtprune.vlm_adapters._base import Batch, Modality, VLMAdapter, square


class BlockReducer:
    """Applies encoder steps: one to the block that yields the features, or several on the way.

    Survivors are written into a full-length buffer at their slots, so that the projector and the
    packer run on what they know; ``survivors`` then picks exactly those tokens. A row of the tower
    is a tile or a frame, and gets its share of its item's budget. Patches that the packer leaves
    out (the padding of a tile) are not chosen from.
    """

    def __init__(
        self,
        adapter: VLMAdapter,
        modality: Modality,
        batch: Batch,
        tap: Tap,
        steps: Sequence[Step],
    ) -> None:
        self.adapter, self.modality, self.batch, self.tap = adapter, modality, batch, tap
        self.steps, self.step = steps, steps[0]
        self.block = adapter.facts.feature_block
        layer = self.step.stage.layer
        self.first = self.block if layer is None else layer
        self.climbs = self.first < self.block or self.step.stage.before_mlp
        self.chosen: list[Selection] | None = None
        self.spots: list[Tensor] = []
        self.owners: list[Tensor] = []
        self.width = 0
        self.climb: Climb | None = None

    @contextmanager
    def hooked(self) -> Iterator[None]:
        blocks = self.adapter.blocks(self.modality)
        hook = self._arrive if self.climbs else self._reduce
        with ExitStack() as undo:
            if self.climbs:
                first = blocks[self.first].register_forward_pre_hook(self._climb, with_kwargs=True)
                undo.callback(first.remove)
            # Ahead of transformers' own capture of hidden states, which a used model has.
            last = blocks[self.block].register_forward_hook(hook, prepend=True, with_kwargs=True)
            undo.callback(last.remove)
            yield
        if self.chosen is None:
            name = type(blocks[self.block]).__name__
            raise HookError(f"{name} was never called; nothing was reduced.")

    def _locate(self, output: Tensor) -> list[int]:
        """Finds the patches that may be chosen; returns the tiles that have any."""
        tiles, p = len(output), self.adapter.n_prefix
        self.width = output.shape[1] - p
        n = n_patches(output, p)
        self.owners = sources(self.adapter, self.modality, n, self.batch, output.device)
        used = torch.zeros(tiles * self.width, dtype=torch.bool, device=output.device)
        owned = torch.cat(self.owners)
        used[owned[owned >= 0]] = True
        self.spots = [row.nonzero()[:, 0] for row in used.view(tiles, self.width)]
        return [b for b, spots in enumerate(self.spots) if len(spots)]

    def _climb(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Goes on to the features as tokens leave; one patch passes through the tower meanwhile."""
        states, p = args[0], self.adapter.n_prefix
        busy = self._locate(states)
        each = zip(*(self._budgets(busy, step) for step in self.steps), strict=True)
        budgets = dict(zip(busy, each, strict=True))
        if all(last.count(n := len(self.spots[b])) == n for b, (*_, last) in budgets.items()):
            self.chosen = [Selection.all(1, len(spots), spots.device) for spots in self.spots]
            return None
        self._refuse_masks(module, (*args[1:], *kwargs.values()))
        others = {name: value for name, value in kwargs.items() if name != "attention_mask"}
        blocks = Blocks(
            self.adapter.blocks(self.modality)[: self.block + 1],
            lambda block, states, mask: block.forward(states, mask, *args[2:], **others),
            self.tap,
            p,
        )
        images = {b: i for i, owner in enumerate(self.owners) for b in self._tiles(owner)}
        self.climb = Climb(blocks, self.steps, states, self.spots, budgets, images)
        self.chosen = self.climb.chosen()
        return (states[:, : p + 1], *args[1:]), kwargs

    def _refuse_masks(self, module: nn.Module, given: Sequence[Any]) -> None:
        """Raises UnsupportedError for a mask that cannot be cut, or one that cannot be added."""
        if any(isinstance(x, Tensor) for x in given):
            raise UnsupportedError(
                f"{type(module).__name__} was given a mask or positions, which do not get shorter "
                "with the tokens. Use a strategy that acts after the tower."
            )
        attention = self.adapter.tower(self.modality).config._attn_implementation
        weighs = any(step.stage.proportional for step in self.steps)
        if weighs and attention not in ("eager", "sdpa"):
            raise UnsupportedError(
                f"{self.step.strategy.name} weighs tokens of the tower by a mask, which "
                f"{attention!r} does not take. Load the model with attn_implementation='sdpa', or "
                "use a strategy that acts after the tower."
            )

    def _arrive(
        self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Tensor
    ) -> Tensor | None:
        return None if self.climb is None else self.climb.features()

    def _reduce(
        self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Tensor
    ) -> Tensor:
        p = self.adapter.n_prefix
        if any(need.layer > self.block for need in self.step.stage.tower_needs):
            self._look_ahead(output, args, kwargs)
        busy, tiles, width = self._locate(output), len(output), self.width
        patches, prefix = output[:, p:], output[:, :p]
        values = {
            need: self.tap.value(need).unflatten(0, (tiles, width))
            for need in self.step.stage.tower_needs
        }
        images = Images(
            [patches[b, self.spots[b]] for b in busy],
            [square(width) if len(self.spots[b]) == width else None for b in busy],
            {need: [value[b, self.spots[b]] for b in busy] for need, value in values.items()},
            None,
            [Selection.all(1, len(self.spots[b]), output.device) for b in busy],
            budgets=self._budgets(busy, self.step),
            n_prefix=p,
        )
        decided = dict(zip(busy, decide(self.step, images), strict=True))
        none = Selection(torch.zeros(1, 0, dtype=torch.long, device=output.device), 0)
        self.chosen = [decided.get(b, none) for b in range(tiles)]
        buffer = output.clone()
        for b in busy:
            spots = self.spots[b]
            made = torch.cat([patches[b, spots], prefix[b]])[None]
            buffer[b, p + spots[self.chosen[b].slots[0]]] = self.chosen[b].apply(made)[0]
        return buffer

    @timed("score")
    def _look_ahead(self, output: Tensor, args: Any, kwargs: dict[str, Any]) -> None:
        """Reads the block after the features, which will get them reduced, on the whole ones."""
        with self.tap.ahead(self.adapter.attention(self.modality, self.block + 1)):
            self.adapter.blocks(self.modality)[self.block + 1](output, *args[1:], **kwargs)

    def _tiles(self, owner: Tensor) -> list[int]:
        """Returns the tiles that the patches of an item are of."""
        return (owner[owner >= 0] // self.width).unique().tolist()

    def _budgets(self, busy: Sequence[int], step: Step) -> list[Budget]:
        """Returns the budget of each tile in a step: its share of its item's."""
        shares: dict[int, Budget] = {}
        for owner in self.owners:
            tiles = self._tiles(owner)
            lengths = [len(self.spots[b]) for b in tiles]
            shares |= dict(zip(tiles, step.budget.split(lengths), strict=True))
        return [shares[b] for b in busy]

    def refuse(self, needs: Sequence[TowerNeed]) -> None:
        """Raises UnsupportedError for what a later step cannot be given once tokens have left."""
        if not self.climbs:
            return
        for need in needs:
            if need.layer > self.block or (isinstance(need, Joint) and need.layer >= self.first):
                raise UnsupportedError(
                    f"{need} is of a block that runs when {self.step.strategy.name} has let tokens "
                    "leave the tower. Follow it with a strategy that does not read it."
                )

    def survivors(
        self, items: Sequence[Item], images: Images, needs: Sequence[TowerNeed]
    ) -> Images:
        """Returns what is left of ``images``, which hold all free tokens of every item."""
        if self.chosen is None:
            return images
        refuse_orphans(self.chosen, needs)
        if self.climb is not None:
            self.climb.refuse_orphans(needs)
        kept = []
        for item, owner in zip(items, self.owners, strict=True):
            kept.append(self._join(owner[item.free])[0])
        slots = [selection.slots[0] for selection in kept]
        return Images(
            [x[s] for x, s in zip(images.tokens, slots, strict=True)],
            [g if k.is_identity else None for g, k in zip(images.grids, kept, strict=True)],
            {n: [x[s] for x, s in zip(v, slots, strict=True)] for n, v in images.values.items()},
            None,
            kept,
            tiles=left_of(images.tiles, kept),
        )

    def _join(self, owner: Tensor) -> tuple[Selection, Tensor]:
        """Joins the selections of the tiles that the free tokens with these patches are of."""
        chosen = self.chosen or []
        place = torch.full((len(self.spots) * self.width,), -1, device=owner.device)
        place[owner] = torch.arange(len(owner), device=owner.device)
        tiles = self._tiles(owner)
        parts = [(chosen[b], place[b * self.width + self.spots[b]]) for b in tiles]
        return join(parts, len(owner), self.adapter.n_prefix)
