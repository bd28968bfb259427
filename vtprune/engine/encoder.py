"""One run of the vision encoder with everything a plan asks for: taps on, steps applied."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vtprune.engine.signals import Images, Step, decide, refuse_orphans, survive
from vtprune.engine.tap import Tap, reading
from vtprune.errors import HookError
from vtprune.types import Selection, Site, TowerNeed
from vtprune.vlm_adapters._base import VLMAdapter

Text = Callable[[list[int]], list[Tensor]]


def encode(
    adapter: VLMAdapter, steps: Sequence[Step], batch: Mapping[str, Any], text: Text | None
) -> tuple[Any, list[Selection]]:
    """Encodes the images of ``batch`` and applies ``steps``.

    Args:
        text: gives each image its instruction's embeddings, from the images' token counts.

    Returns:
        The encoder's output with the surviving tokens of each image, and each image's selection
        (batch dimension 1, positions before any step).
    """
    tap = Tap(tapped(adapter, steps), adapter.n_prefix)
    reducer = _BlockReducer(adapter, tap, [s for s in steps if s.stage.site is Site.ENCODER])
    with reading(tap), reducer.hooked():
        output = adapter.encode(batch)
    after = [step for step in steps if step.stage.site is Site.PROJECTOR]
    images = reducer.survivors(adapter.items(output), _needs(after))
    if text is not None:
        images.text = text([selection.n for selection in images.kept])
    for i, step in enumerate(after):
        images = survive(images, decide(step, images), _needs(after[i + 1 :]))
    return adapter.pack(output, images.tokens), images.kept


def tapped(adapter: VLMAdapter, steps: Sequence[Step]) -> dict[nn.Module, list[TowerNeed]]:
    """Returns what is read in which attention module."""
    wanted: dict[nn.Module, list[TowerNeed]] = {}
    for need in _needs(steps):
        wanted.setdefault(adapter.attention(need.layer), []).append(need)
    return wanted


def _needs(steps: Sequence[Step]) -> list[TowerNeed]:
    """Quantities of the tower that the steps read, each once."""
    return list(dict.fromkeys(need for step in steps for need in step.stage.tower_needs))


class _BlockReducer:
    """Applies an encoder step to the output of the block that yields the features.

    Survivors are written into a full-length buffer at their slots, so that the projector runs on
    what it knows; ``survivors`` then picks exactly those rows.
    """

    def __init__(self, adapter: VLMAdapter, tap: Tap, steps: Sequence[Step]) -> None:
        self.adapter, self.tap = adapter, tap
        self.step = steps[0] if steps else None
        self.chosen: list[Selection] | None = None

    @contextmanager
    def hooked(self) -> Iterator[None]:
        if self.step is None:
            yield
            return
        block = self.adapter.block(self.adapter.facts.feature_block)
        # Ahead of transformers' own capture of hidden states, which an already used model has.
        hook = block.register_forward_hook(self._reduce, prepend=True)
        try:
            yield
        finally:
            hook.remove()
        if self.chosen is None:
            raise HookError(f"{type(block).__name__} was never called; nothing was reduced.")

    def _images(self, tokens: Sequence[Tensor], needs: Sequence[TowerNeed]) -> Images:
        values = self.tap.values()
        return Images(
            list(tokens),
            [self.adapter.grid(len(x)) for x in tokens],
            {need: list(values[need]) for need in needs},
            None,
            [Selection.all(1, len(x), x.device) for x in tokens],
        )

    def _reduce(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        step, p = self.step, self.adapter.n_prefix
        if step is None:
            return output
        prefix, patches = output[:, :p], output[:, p:]
        self.chosen = decide(step, self._images(list(patches), _needs([step])))
        buffer = output.clone()
        sources = torch.cat([patches, prefix], dim=1)
        for b, selection in enumerate(self.chosen):
            buffer[b, p + selection.slots[0]] = selection.apply(sources[b : b + 1])[0]
        return buffer

    def survivors(self, items: list[Tensor], needs: Sequence[TowerNeed]) -> Images:
        """Returns the projected survivors of every image."""
        images = self._images(items, needs)
        if self.chosen is None:
            return images
        refuse_orphans(self.chosen, needs)
        slots = [selection.slots[0] for selection in self.chosen]
        return Images(
            [x[s] for x, s in zip(items, slots, strict=True)],
            [None] * len(items),
            {n: [x[s] for x, s in zip(v, slots, strict=True)] for n, v in images.values.items()},
            None,
            self.chosen,
        )
