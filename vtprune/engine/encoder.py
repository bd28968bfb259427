"""One run of the vision encoder with everything a plan asks for: taps on, steps applied."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vtprune.engine.compaction import rows_of
from vtprune.engine.items import Item, items_of, stand
from vtprune.engine.reducer import BlockReducer
from vtprune.engine.report import TileReport
from vtprune.engine.scopes import decide_in_scope
from vtprune.engine.signals import Images, Step, survive
from vtprune.engine.tap import Tap, reading
from vtprune.engine.text_tower import TextTower
from vtprune.engine.timing import part, timed
from vtprune.engine.tower import Climb
from vtprune.types import Joint, Newlines, Patches, Quantity, Selection, Site, Tile, TowerNeed
from vtprune.vlm_adapters._base import Batch, Modality, VLMAdapter

Text = Callable[[Sequence[Item]], list[Tensor]]


@dataclass(frozen=True)
class Encoded:
    """What the language model gets, per modality, and what was chosen of each item.

    ``selections`` have batch dimension 1 and positions before any step; ``tiles`` are the rows of
    the tower, none where it is not known. ``features`` are what was read for the language model of
    the tokens that are left, ``[K_i, C]`` per item, no number of those made of no patch.
    """

    outputs: Mapping[str, Any]
    items: Sequence[Item]
    selections: list[Selection]
    tiles: tuple[TileReport, ...]
    features: Mapping[Quantity, list[Tensor]]


def encode(
    adapter: VLMAdapter,
    steps: Sequence[Step],
    batch: Batch,
    text: Text | None,
    newlines: Newlines,
    text_tower: TextTower | None = None,
    features: Sequence[TowerNeed] = (),
) -> Encoded:
    """Encodes the images and videos of ``batch`` and applies ``steps``.

    Args:
        features: what to read of the block that yields the features for the language model.
        text: gives each item its instruction's embeddings.
        text_tower: projects patches where a step reads them in its space.
    """
    inside = [step for step in steps if step.stage.site is Site.ENCODER]
    after = [step for step in steps if step.stage.site is Site.PROJECTOR]
    runs = [
        _Run(adapter, modality, [*inside, *after], batch, text_tower, features)
        for modality in adapter.modalities
        if modality.given(batch)
    ]
    images = runs[0].images
    for run in runs[1:]:
        images = images.and_also(run.images)
    items = [item for run in runs for item in run.items]
    samples = rows_of(batch["input_ids"], items)
    if text is not None:
        with part("score"):
            images.text = text(items)
    for i, step in enumerate(after):
        chosen = decide_in_scope(step, images, samples)
        images = survive(images, chosen, tower_needs(after[i + 1 :]))
    stood = [
        stand(item, chosen, tokens, newlines)
        for item, chosen, tokens in zip(items, images.kept, images.tokens, strict=True)
    ]
    outputs, first = {}, 0
    for run in runs:
        outputs[run.modality.name] = run.pack(stood[first : first + len(run.items)])
        first += len(run.items)
    tiles = tuple(tile for run in runs for tile in run.tiles)
    selections = [selection for selection, _ in stood]
    read: dict[Quantity, list[Tensor]] = {}
    for need in features:
        carried = [value for run in runs for value in run.carried(need)]
        pairs = zip(selections, carried, strict=True)
        read[need] = [value[chosen.slots[0].to(value.device)] for chosen, value in pairs]
    return Encoded(outputs, items, selections, tiles, read)


def tower_needs(steps: Sequence[Step]) -> list[TowerNeed]:
    """Quantities of the tower that the steps read, each once."""
    return list(dict.fromkeys(need for step in steps for need in step.stage.tower_needs))


class _Run:
    """The encoder's run for one modality.

    Attributes:
        items: what it yields, whole.
        images: their free tokens with what the later steps read, or what an encoder step left.
        tiles: the rows of the tower.
    """

    def __init__(
        self,
        adapter: VLMAdapter,
        modality: Modality,
        steps: Sequence[Step],
        batch: Batch,
        text_tower: TextTower | None,
        features: Sequence[TowerNeed],
    ) -> None:
        self.adapter, self.modality, self.batch = adapter, modality, batch
        self.text_tower, self.outputs = text_tower, dict[TowerNeed, list[Tensor]]()
        needs = [*tower_needs(steps), *features]
        wanted: dict[nn.Module, list[TowerNeed]] = {}
        for need in needs:
            if not isinstance(need, (Joint, Patches, Tile)):
                wanted.setdefault(adapter.attention(modality, need.layer), []).append(need)
        self.tap = Tap(wanted, adapter.n_prefix, adapter.segments(modality, batch))
        inside = [step for step in steps if step.stage.site is Site.ENCODER]
        reducer = BlockReducer(adapter, modality, batch, self.tap, inside) if inside else None
        later = tower_needs([step for step in steps if step not in inside])
        if reducer is not None:
            reducer.refuse(later)
        hooked = reducer.hooked() if reducer else nullcontext()
        with reading(self.tap), hooked, self._watching(needs):
            self.output = adapter.encode(modality, batch)
        self.items = items_of(adapter, modality, self.output, batch)
        self.tiles = self._tiles(None if reducer is None else reducer.climb)
        self.images = self._images(later)
        if reducer is not None:
            self.images = reducer.survivors(self.items, self.images, later)

    @contextmanager
    def _watching(self, needs: Sequence[TowerNeed]) -> Iterator[None]:
        """Keeps the outputs of blocks whose patches are read, or projects them for the text tower.

        The hooks come after that of a step, which leaves what it merged in a whole output.
        """

        def hook(need: TowerNeed) -> Callable[..., None]:
            def keep(module: nn.Module, args: Any, output: Tensor) -> None:
                patches = output[..., self.adapter.n_prefix :, :]
                if isinstance(need, Joint) and self.text_tower is not None:
                    patches = self.text_tower.patches(patches)
                self.outputs.setdefault(need, []).append(patches.flatten(0, -2).float())

            return keep

        with ExitStack() as undo:
            for need in needs:
                if isinstance(need, (Joint, Patches)):
                    block = self.adapter.blocks(self.modality)[need.layer]
                    undo.callback(block.register_forward_hook(hook(need)).remove)
            yield

    @timed("score")
    def values(self, need: TowerNeed) -> list[Tensor]:
        """Returns a quantity at the free tokens of each item, ``[m_i, ...]``."""
        if isinstance(need, Tile):
            return [item.tile for item in self.items]
        return [
            value[item.free] for value, item in zip(self.carried(need), self.items, strict=True)
        ]

    def carried(self, need: TowerNeed) -> list[Tensor]:
        """Returns a quantity of the tokens of each item, ``[n_i, ...]``."""
        found = self.outputs.get(need)
        flat = self.tap.value(need) if found is None else torch.cat(found)
        carried = self.adapter.carry(self.modality, flat.reshape(len(flat), -1), self.batch)
        return [value.reshape(-1, *flat.shape[1:]) for value in carried]

    def _images(self, needs: Sequence[TowerNeed]) -> Images:
        return Images(
            [item.tokens[item.free] for item in self.items],
            [item.grid for item in self.items],
            {need: self.values(need) for need in needs},
            None,
            [Selection.all(1, len(item.free), item.free.device) for item in self.items],
            tiles=[item.tiles for item in self.items],
        )

    def _tiles(self, climb: Climb | None) -> list[TileReport]:
        if not self.adapter.facts.vision_layers:
            return []
        states, config = self.output.last_hidden_state, self.adapter.tower(self.modality).config
        lengths = self.tap.segments or [states.shape[1]] * len(states)
        blocks = self.adapter.facts.feature_block + 1
        reports = []
        for tile, n in enumerate(lengths):
            whole = (n,) * blocks
            attended, passed = (whole, whole) if climb is None else climb.way(tile)
            reports.append(TileReport(n, attended, passed, config))
        return reports

    @timed("compact")
    def pack(self, stood: Sequence[tuple[Selection, Tensor]]) -> Any:
        """Returns the output with what is left of each item; as it was where everything is."""
        if all(selection.is_identity for selection, _ in stood):
            return self.output
        planes = self.adapter.planes(self.output)
        left = [
            s.apply_all(*(plane[item][None] for plane in planes))
            for item, (s, _) in enumerate(stood)
        ]
        planes = [[x[0] for x in plane] for plane in zip(*left, strict=True)]
        return self.adapter.pack(self.output, [x for _, x in stood], planes)
