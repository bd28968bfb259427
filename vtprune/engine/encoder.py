"""One run of the vision encoder with everything a plan asks for: taps on, steps applied."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vtprune.engine.items import Item, items_of, join, n_patches, sources, stand
from vtprune.engine.signals import Images, Step, decide, refuse_orphans, survive
from vtprune.engine.tap import Tap, reading
from vtprune.errors import HookError
from vtprune.types import Budget, Newlines, Selection, Site, TowerNeed
from vtprune.vlm_adapters._base import Batch, Modality, VLMAdapter, square

Text = Callable[[Sequence[Item]], list[Tensor]]


@dataclass(frozen=True)
class Encoded:
    """What the language model gets, per modality, and what was chosen of each item.

    ``selections`` have batch dimension 1 and positions before any step.
    """

    outputs: Mapping[str, Any]
    items: Sequence[Item]
    selections: list[Selection]


def encode(
    adapter: VLMAdapter,
    steps: Sequence[Step],
    batch: Batch,
    text: Text | None,
    newlines: Newlines,
) -> Encoded:
    """Encodes the images and videos of ``batch`` and applies ``steps``.

    Args:
        text: gives each item its instruction's embeddings.
    """
    inside = [step for step in steps if step.stage.site is Site.ENCODER]
    after = [step for step in steps if step.stage.site is Site.PROJECTOR]
    runs = [
        _Run(adapter, modality, [*inside, *after], batch)
        for modality in adapter.modalities
        if modality.given(batch)
    ]
    images = runs[0].images
    for run in runs[1:]:
        images = images.and_also(run.images)
    items = [item for run in runs for item in run.items]
    if text is not None:
        images.text = text(items)
    for i, step in enumerate(after):
        images = survive(images, decide(step, images), tower_needs(after[i + 1 :]))
    stood = [
        stand(item, chosen, tokens, newlines)
        for item, chosen, tokens in zip(items, images.kept, images.tokens, strict=True)
    ]
    outputs, first = {}, 0
    for run in runs:
        outputs[run.modality.name] = run.pack(stood[first : first + len(run.items)])
        first += len(run.items)
    return Encoded(outputs, items, [selection for selection, _ in stood])


def tower_needs(steps: Sequence[Step]) -> list[TowerNeed]:
    """Quantities of the tower that the steps read, each once."""
    return list(dict.fromkeys(need for step in steps for need in step.stage.tower_needs))


class _Run:
    """The encoder's run for one modality.

    Attributes:
        items: what it yields, whole.
        images: their free tokens with what the later steps read, or what an encoder step left.
    """

    def __init__(
        self, adapter: VLMAdapter, modality: Modality, steps: Sequence[Step], batch: Batch
    ) -> None:
        self.adapter, self.modality, self.batch = adapter, modality, batch
        wanted: dict[nn.Module, list[TowerNeed]] = {}
        for need in tower_needs(steps):
            wanted.setdefault(adapter.attention(modality, need.layer), []).append(need)
        self.tap = Tap(wanted, adapter.n_prefix, adapter.segments(modality, batch))
        inside = [step for step in steps if step.stage.site is Site.ENCODER]
        reducer = _BlockReducer(self, inside[0]) if inside else None
        with reading(self.tap), reducer.hooked() if reducer else nullcontext():
            self.output = adapter.encode(modality, batch)
        self.items = items_of(adapter, modality, self.output, batch)
        later = tower_needs([step for step in steps if step not in inside])
        self.images = self._images(later)
        if reducer is not None:
            self.images = reducer.survivors(self.images, later)

    def values(self, need: TowerNeed) -> list[Tensor]:
        """Returns a quantity at the free tokens of each item, ``[m_i, ...]``."""
        flat = self.tap.value(need)
        patches = flat.reshape(len(flat), -1)
        carried = self.adapter.carry(self.modality, patches, self.batch)
        return [
            value[item.free].reshape(-1, *flat.shape[1:])
            for value, item in zip(carried, self.items, strict=True)
        ]

    def _images(self, needs: Sequence[TowerNeed]) -> Images:
        return Images(
            [item.tokens[item.free] for item in self.items],
            [item.grid for item in self.items],
            {need: self.values(need) for need in needs},
            None,
            [Selection.all(1, len(item.free), item.free.device) for item in self.items],
        )

    def pack(self, stood: Sequence[tuple[Selection, Tensor]]) -> Any:
        """Returns the output with what is left of each item; as it was where everything is."""
        if all(selection.is_identity for selection, _ in stood):
            return self.output
        planes = [
            [s.apply(x[None])[0] for (s, _), x in zip(stood, plane, strict=True)]
            for plane in self.adapter.planes(self.output)
        ]
        return self.adapter.pack(self.output, [x for _, x in stood], planes)


class _BlockReducer:
    """Applies an encoder step to the output of the block that yields the features.

    Survivors are written into a full-length buffer at their slots, so that the projector and the
    packer run on what they know; ``survivors`` then picks exactly those tokens. A row of the tower
    is a tile or a frame, and gets its share of its item's budget. Patches that the packer leaves
    out (the padding of a tile) are not chosen from.
    """

    def __init__(self, run: _Run, step: Step) -> None:
        self.run, self.step = run, step
        self.chosen: list[Selection] | None = None
        self.spots: list[Tensor] = []
        self.owners: list[Tensor] = []
        self.width = 0

    @contextmanager
    def hooked(self) -> Iterator[None]:
        adapter = self.run.adapter
        block = adapter.blocks(self.run.modality)[adapter.facts.feature_block]
        # Ahead of transformers' own capture of hidden states, which an already used model has.
        hook = block.register_forward_hook(self._reduce, prepend=True)
        try:
            yield
        finally:
            hook.remove()
        if self.chosen is None:
            raise HookError(f"{type(block).__name__} was never called; nothing was reduced.")

    def _reduce(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        run, p = self.run, self.run.adapter.n_prefix
        patches, prefix = output[:, p:], output[:, :p]
        tiles, width = patches.shape[:2]
        self.width = width
        self.owners = sources(
            run.adapter, run.modality, n_patches(output, p), run.batch, output.device
        )
        used = torch.zeros(tiles * width, dtype=torch.bool, device=output.device)
        owned = torch.cat(self.owners)
        used[owned[owned >= 0]] = True
        self.spots = [row.nonzero()[:, 0] for row in used.view(tiles, width)]
        values = {
            need: run.tap.value(need).unflatten(0, (tiles, width))
            for need in self.step.stage.tower_needs
        }
        busy = [b for b, spots in enumerate(self.spots) if len(spots)]
        images = Images(
            [patches[b, self.spots[b]] for b in busy],
            [square(width) if len(self.spots[b]) == width else None for b in busy],
            {need: [value[b, self.spots[b]] for b in busy] for need, value in values.items()},
            None,
            [Selection.all(1, len(self.spots[b]), output.device) for b in busy],
            budgets=self._budgets(busy),
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

    def _budgets(self, busy: Sequence[int]) -> list[Budget]:
        """Returns the budget of each tile: its share of its item's."""
        shares: dict[int, Budget] = {}
        for owner in self.owners:
            tiles = (owner[owner >= 0] // self.width).unique().tolist()
            lengths = [len(self.spots[b]) for b in tiles]
            shares |= dict(zip(tiles, self.step.budget.split(lengths), strict=True))
        return [shares[b] for b in busy]

    def survivors(self, images: Images, needs: Sequence[TowerNeed]) -> Images:
        """Returns what is left of ``images``, which hold all free tokens of every item."""
        if self.chosen is None:
            return images
        refuse_orphans(self.chosen, needs)
        kept = []
        for item, owner in zip(self.run.items, self.owners, strict=True):
            kept.append(self._join(owner[item.free])[0])
        slots = [selection.slots[0] for selection in kept]
        return Images(
            [x[s] for x, s in zip(images.tokens, slots, strict=True)],
            [g if k.is_identity else None for g, k in zip(images.grids, kept, strict=True)],
            {n: [x[s] for x, s in zip(v, slots, strict=True)] for n, v in images.values.items()},
            None,
            kept,
        )

    def _join(self, owner: Tensor) -> tuple[Selection, Tensor]:
        """Joins the selections of the tiles that the free tokens with these patches are of."""
        chosen = self.chosen or []
        place = torch.full((len(self.spots) * self.width,), -1, device=owner.device)
        place[owner] = torch.arange(len(owner), device=owner.device)
        tiles = (owner // self.width).unique().tolist()
        parts = [(chosen[b], place[b * self.width + self.spots[b]]) for b in tiles]
        return join(parts, len(owner), self.run.adapter.n_prefix)
