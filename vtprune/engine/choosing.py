"""Attention among some tokens of a prompt, chosen in that layer, and what its cache holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vtprune.engine.cuts import Cut
from vtprune.engine.decoding import Decoding
from vtprune.engine.held import Bits, Held, pick
from vtprune.engine.masks import explicit
from vtprune.engine.timing import part
from vtprune.errors import UnsupportedError
from vtprune.rules import Chooser, RowRule

# Layers of a cache that grow with every token, so that they may be shorter too.
GROWING = {"DynamicLayer", "DynamicSlidingWindowLayer", "Held"}


def among_chosen(
    number: int,
    decoding: Decoding,
    chooser: Chooser,
    forward: Callable[..., tuple[Tensor, Any]],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """Returns what attention gives in layer ``number``, ``[B, L, H, d]``; 0 of who is not chosen.

    Text always is.

    Raises:
        UnsupportedError: the cache has a fixed length.
    """
    length = query.shape[2]
    if key.shape[2] != length:
        raise UnsupportedError(
            f"Layer {number} has {key.shape[2]} keys for {length} queries, but tokens that are not "
            "chosen leave its cache. Leave cache_implementation out."
        )
    columns = decoding.cut(number) or Cut.whole(decoding.valid)
    valid, visual = (x.to(query.device) for x in (columns.valid, columns.of(decoding.visual)))
    seen = explicit(mask, module, query, key, kwargs)
    with part("score"):
        scale = kwargs.get("scaling")
        stays = _chosen(chooser, decoding.copies, query, key, seen, valid, visual, scale)
    few = Cut.whole(valid).keep(stays, valid, renumber=False)
    parts = (pick(x, few.index.clamp(min=0)) for x in (query, key, value))
    mask = few.prompt_mask(seen if few.padded else mask)
    out, weights = forward(module, *parts, mask, *args, **kwargs)
    own = columns.index.to(query.device).gather(1, few.index.clamp(min=0))
    index = own.masked_fill(few.index < 0, -1)
    decoding.chosen[number] = replace(columns, index=index, moved=None, padded=few.padded)
    spared = length**2 - few.index.shape[1] ** 2
    decoding.spared += 2 * spared * query[:, :, 0].numel()
    return few.spread(out, length), weights


@torch.no_grad()
def _chosen(
    chooser: Chooser,
    copies: int,
    query: Tensor,
    key: Tensor,
    mask: Tensor,
    valid: Tensor,
    visual: Tensor,
    scale: float | None,
) -> Tensor:
    """Returns which tokens are, ``[B, L]`` bool; decided once per prompt, its copies follow."""
    stays = valid & ~visual
    for b in range(0, len(query), copies):
        spots = valid[b].nonzero()[:, 0]
        asking = spots[chooser.asking(len(spots)).to(spots.device)]
        rows = mask[b if len(mask) > 1 else 0, 0, asking][:, spots]
        seen = rows if rows.dtype == torch.bool else rows >= 0
        q, k = query[b : b + 1, :, asking], key[b : b + 1, :, spots]
        stays[b : b + copies, spots] |= chooser.choose(q, k, seen, scale)
    return stays


def settle(cache: Any, number: int, decoding: Decoding, rule: RowRule) -> None:
    """Drops or packs in a layer's cache what the rule says.

    Raises:
        UnsupportedError: a cache that cannot be shortened.
    """
    chosen = decoding.chosen[number]
    marks = chosen.spread(torch.ones_like(chosen.index, dtype=torch.bool), chosen.length)
    own = decoding.cut(number) or Cut.whole(decoding.valid)
    stays = own.of(marks.to(own.index.device))
    hold(cache, number, decoding, stays, rule.bits if rule.others == "pack" else None)


def hold(
    cache: Any, number: int, decoding: Decoding, stays: Tensor, bits: Bits | None = None
) -> None:
    """Puts in the place of a layer's cache one that holds what of the prompt ``stays``.

    Args:
        stays: ``[B, n]`` or ``[B, H, n]`` bool over the columns that the layer saw; bits: as of
            ``Held``.

    Raises:
        UnsupportedError: a cache that cannot be shortened.
    """
    layer: Any = cache.layers[number]
    if type(layer).__name__ not in GROWING:
        raise UnsupportedError(
            f"The cache of layer {number} is a {type(layer).__name__}, from which no token can be "
            "taken. Leave cache_implementation out."
        )
    columns = decoding.cut(number) or Cut.whole(decoding.valid)
    if layer.keys.shape[2] < columns.index.shape[1]:
        raise UnsupportedError(
            f"The cache of layer {number} has only the last {layer.keys.shape[2]} of "
            f"{columns.index.shape[1]} tokens, as its window slides. Use a strategy that acts "
            "before the language model, such as 'divprune'."
        )
    held = Held(layer, columns, bits)
    held.settle(columns.index, stays, columns.length)
    cache.layers[number] = decoding.held[number] = held


@torch.no_grad()
def settle_again(
    held: Held,
    chooser: Chooser,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    scale: float | None,
) -> None:
    """Does so with all that was decoded since, by its last query; each row by its own.

    Args:
        query: ``[B, H, m, d]`` of what is decoded now, ``key`` ``[B, Hkv, n, d]`` of all.
        mask: ``[., ., m, n]`` bool or additive; None = all is seen.
    """
    new, length = held.seen, held.cut.length
    seen = torch.ones(len(key), key.shape[2], dtype=torch.bool, device=key.device)
    if mask is not None:
        last = mask[:, 0, -1]
        seen &= last if last.dtype == torch.bool else last >= 0
    chosen = torch.zeros_like(seen[:, -new:])
    for b, row in enumerate(seen):
        asked, q, k = row[-new:], query[b : b + 1, :, -1:], key[b : b + 1, :, row]
        if bool(asked.any()):
            chosen[b, asked] = chooser.choose_again(q, k, scale, int(asked.sum()))
    columns = torch.arange(length, length + new, device=key.device)
    held.settle(columns.expand(len(key), -1), chosen, length + new)
