"""What is measured of a call besides its tokens: its times, its tower, what its cache holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import Cache

from vtprune.engine.compaction import Prompt
from vtprune.engine.held import Held
from vtprune.engine.report import CacheReport, TileReport
from vtprune.engine.timing import Clock

# Layers of a cache whose keys and values are all that it holds, one entry per token.
PLAIN = {"DynamicLayer", "DynamicSlidingWindowLayer", "StaticLayer", "StaticSlidingWindowLayer"}
PLAIN |= {"Held"}


@dataclass
class Measured:
    """What is measured of one call, with ``clock`` its times too."""

    clock: Clock | None = None
    tiles: tuple[TileReport, ...] = ()
    cache: CacheReport | None = None

    def look(self, output: Any, prompt: Prompt | None, config: Any) -> None:
        """Takes the size of the cache that a language model returns, once the prompt is in it."""
        cache = getattr(output, "past_key_values", None)
        if self.cache is None and prompt is not None and isinstance(cache, Cache):
            window = getattr(config, "sliding_window", None)
            self.cache = cache_report(cache, prompt.short, prompt.length, window)


def cache_report(cache: Cache, short: int, full: int, window: int | None) -> CacheReport | None:
    """Returns what a cache holds of a prompt of ``short`` columns that had ``full`` of them.

    Tokens behind the prompt do not count. ``window`` is that of layers that slide.

    Returns:
        None where the whole prompt is not in it yet, or layers hold more than keys and values.
    """
    behind = int(cache.get_seq_length()) - short
    every: list[Any] = list(cache.layers)
    layers = [layer for layer in every if getattr(layer, "is_initialized", True)]
    if behind < 0 or not layers or any(type(layer).__name__ not in PLAIN for layer in layers):
        return None
    held = unpruned = allocated = 0
    for layer in layers:
        room = layer.keys.shape[2]
        entry = sum(_entry(x) for x in (layer.keys, layer.values))
        # A dynamic layer keeps one token less than its window: the next one comes with the query.
        last = full if window is None else window - (0 if layer.is_compileable else 1)
        unpruned += entry * (min(full, last) if layer.is_sliding else full)
        if isinstance(layer, Held):
            held, allocated = held + layer.nbytes, allocated + layer.nbytes
            continue
        held += entry * min(int(layer.get_seq_length()) - behind, room)
        allocated += entry * room
    return CacheReport(held, unpruned, allocated)


def _entry(x: Tensor) -> int:
    """Returns the bytes that one token takes of keys or values ``[B, H, n, d]``."""
    batch, heads, _, width = x.shape
    return batch * heads * width * x.element_size()
