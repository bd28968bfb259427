"""A layer's cache that holds some of the tokens that went by, or all of them in few bits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from vtprune.engine.cuts import Cut
from vtprune.engine.packing import Packed, pack
from vtprune.errors import UnsupportedError

Bits = tuple[int, int]


class Held(DynamicLayer):
    """In place of a layer's cache once that has the prompt; what comes next is a tail as it is.

    It counts all tokens that went by, and has masks made for them, so that any layer may hold less,
    also the first one, by which transformers counts. ``cut`` fits the masks to what is held.

    Keys are packed by channel and values by token, so a group is of neighbouring tokens or of
    neighbouring channels. Attention finds them unpacked, layer by layer and only while it runs.

    Heads may hold different tokens, each equally many of a row: first come those that all hold.

    Attributes:
        cut: columns that are settled, of the prompt and of what was decoded, in the order held;
            where heads differ those of the first, as a mask tells padding from tokens alone.
        parts: of settled tokens, if packed, keys ``[B, H, d, n]`` and values ``[B, H, n, d]``.
        keys, values: ``[B, H, n, d]`` of the other settled tokens, then of the tail.

    Args:
        layer: the cache, whose tokens all become the tail.
        cut: columns that the layer saw of the prompt.
        bits: numbers of bits for settled tokens that were chosen and for the others; None = chosen
            ones stay as they are and the others leave.
    """

    keys: Any
    values: Any

    def __init__(self, layer: Any, cut: Cut, bits: Bits | None) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = layer.keys, layer.values, True
        self.dtype, self.device, self.is_sliding = layer.dtype, layer.device, layer.is_sliding
        self.bits = bits
        self.parts: list[tuple[Packed, Packed]] = []
        self.cut = replace(cut, index=cut.index[:, :0], length=0, moved=None, padded=False)

    @property
    def seen(self) -> int:
        """Tokens of the tail."""
        packed = sum(values.codes.shape[2] for _, values in self.parts)
        return packed + self.keys.shape[2] - self.cut.index.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        packed = sum(part.nbytes for pair in self.parts for part in pair)
        return packed + sum(x.numel() * x.element_size() for x in (self.keys, self.values))

    def settle(self, columns: Tensor, chosen: Tensor, length: int) -> None:
        """Drops or packs the tail.

        Args:
            columns: ``[B, n]`` int64 of its tokens; -1 = none, which is not held.
            chosen: ``[B, n]`` bool; or ``[B, H, n]``, of each head equally many.
            length: columns that went by.
        """
        first = self.keys.shape[2] - columns.shape[1]
        tail = [x[:, :, first:] for x in (self.keys, self.values)]
        stays = [[x[:, :, :first]] for x in (self.keys, self.values)]
        index = [self.cut.index]
        for bits, some in self._sets(columns >= 0, chosen):
            places, there = _few(some)
            index.append(columns.gather(1, places[:, 0]).masked_fill(~there[:, 0], -1))
            keys, values = (pick(x, places) for x in tail)
            if bits is None:
                stays[0].append(keys)
                stays[1].append(values)
            else:
                self.parts.append((pack(keys.mT, bits), pack(values, bits)))
        self.keys, self.values = (torch.cat(x, dim=2) for x in stays)
        known = torch.cat(index, dim=1)
        self.cut = replace(self.cut, index=known, length=length, padded=bool((known < 0).any()))

    def _sets(self, valid: Tensor, chosen: Tensor) -> Iterator[tuple[int | None, Tensor]]:
        """Yields in how many bits which tokens are held, ``[B, 1 or H, n]``, None = as they are."""
        chosen, valid = chosen[:, None] if chosen.ndim == 2 else chosen, valid[:, None]
        if self.bits is None:
            sets: list[tuple[int | None, Tensor]] = [(None, valid & chosen)]
        else:
            sets = list(zip(self.bits, (valid & chosen, valid & ~chosen), strict=True))
        yield from ((bits, some) for bits, some in sets if bool(some.any()))

    # -- what transformers asks of a layer's cache -------------------------------------------------

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        packed = [[x.unpack().to(keys.device) for x in pair] for pair in self.parts]
        if not packed:
            return keys, values
        return (
            torch.cat([*(k.mT for k, _ in packed), keys], dim=2),
            torch.cat([*(v for _, v in packed), values], dim=2),
        )

    def get_seq_length(self) -> int:
        """Returns how many tokens went by, held or not."""
        return self.cut.length + self.seen if self.is_initialized else 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = torch.arange(len(self.cut.index), device=self.device)
        self.batch_select_indices(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.keys, self.values = (x[indices.to(x.device)] for x in (self.keys, self.values))
        self.parts = [(k.rows(indices), v.rows(indices)) for k, v in self.parts]
        self.cut = self.cut.rows(indices.to(self.cut.index.device))

    def crop(self, tokens_to_remove: int) -> None:
        """Takes the last ``-tokens_to_remove`` tokens out.

        Raises:
            UnsupportedError: more than the tail has, or a length to be left.
        """
        if not -self.seen <= tokens_to_remove <= 0:
            raise UnsupportedError(
                f"crop({tokens_to_remove}): of this cache the last {self.seen} tokens can be taken "
                f"out, by a number of -{self.seen} to 0; those before were dropped or packed. "
                "Read the prompt again instead."
            )
        left = self.keys.shape[2] + tokens_to_remove
        self.keys, self.values = self.keys[:, :, :left], self.values[:, :, :left]

    def reset(self) -> None:
        """Forgets everything."""
        self.keys = self.values = None
        self.is_initialized, self.parts = False, []
        self.cut = replace(self.cut, index=self.cut.index[:, :0], length=0, padded=False)


def _few(some: Tensor) -> tuple[Tensor, Tensor]:
    """Returns where ``some`` ``[B, H, n]`` bool is, ``[B, H, m]``, and which are there.

    Ascending, but what is there in all heads comes first. The others come last and repeat the first
    one: so groups of tokens have the same ranges in any batch.
    """
    counts = some.sum(-1, keepdim=True)
    turn = torch.where(some, ~some.all(1, keepdim=True), 2)
    order = turn.argsort(dim=-1, stable=True)[..., : int(counts.max())]
    there = torch.arange(order.shape[-1], device=some.device) < counts
    return torch.where(there, order, order[..., :1]), there


def pick(x: Tensor, places: Tensor) -> Tensor:
    """Returns tokens of ``x`` ``[B, H, n, d]`` at ``places`` ``[B, m]`` or ``[B, 1 or H, m]``."""
    rows = places.to(x.device)
    rows = rows[:, None] if rows.ndim == 2 else rows
    return x.gather(2, rows[..., None].expand(-1, x.shape[1], -1, x.shape[3]))
