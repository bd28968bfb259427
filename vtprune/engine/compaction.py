"""Prompt compaction: the placeholders of dropped visual tokens leave every per-token input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor

from vtprune.engine.items import Item
from vtprune.engine.positions import gather_positions
from vtprune.engine.timing import timed
from vtprune.errors import InputError
from vtprune.types import Positions, Selection
from vtprune.vlm_adapters._base import Modality

# Per-token inputs besides ids, mask and positions, with the value that padding gets.
PER_TOKEN = {"token_type_ids": 0, "mm_token_type_ids": 0, "labels": -100}


@dataclass(frozen=True)
class Prompt:
    """A prompt and what became of it.

    Attributes:
        ids: ``[B, L]`` as the caller gave them.
        valid: ``[B, L]`` bool, real tokens.
        index: ``[B, L']`` source position of each token of the short prompt, -1 = padding.
        sample: row of each item.
        selections: of each item.
        changed: whether any token left, moved or was merged. The length does not tell: the
            longest row may have no image.
    """

    ids: Tensor
    valid: Tensor
    index: Tensor
    sample: list[int]
    selections: Sequence[Selection]
    changed: bool

    @property
    def length(self) -> int:
        return self.ids.shape[1]

    @property
    def short(self) -> int:
        return self.index.shape[1]


def samples_of(ids: Tensor, modality: Modality, lengths: Sequence[int]) -> list[int]:
    """Returns the row that each item belongs to.

    Args:
        ids: ``[B, L]``.
        lengths: visual tokens of each item of this modality, in order.

    Raises:
        InputError: placeholders and items disagree, in all or in one row.
    """
    per_row = (ids == modality.placeholder).sum(1).tolist()
    if sum(per_row) != sum(lengths):
        raise InputError(
            f"The prompts hold {sum(per_row)} {modality.name} placeholders (id "
            f"{modality.placeholder}), but the {len(lengths)} {modality.item}s give {sum(lengths)} "
            "visual tokens. Build ids and pixels with the same processor, and pass as many "
            f"{modality.name}s as the prompts name."
        )
    rows, ends = [], list(accumulate(per_row))
    for first, last in zip([0, *accumulate(lengths)], accumulate(lengths), strict=False):
        row = next(i for i, end in enumerate(ends) if first < end)
        if last > ends[row]:
            raise InputError(
                f"Row {row} holds {per_row[row]} {modality.name} placeholders, which is no whole "
                f"number of its {modality.item}s ({list(lengths)} visual tokens in order). Check "
                f"that each prompt names its own {modality.name}s."
            )
        rows.append(row)
    return rows


def rows_of(ids: Tensor, items: Sequence[Item]) -> list[int]:
    """Returns the row that each item belongs to, for items of several modalities in turn."""
    rows = []
    for modality, group in groupby(items, key=lambda item: item.modality):
        rows += samples_of(ids, modality, [len(item) for item in group])
    return rows


def of_patches(ids: Tensor, items: Sequence[Item]) -> Tensor:
    """Marks the visual tokens among ``ids`` ``[B, L]`` that are made of patches, bool."""
    made = torch.zeros_like(ids, dtype=torch.bool)
    for token in {item.modality.placeholder for item in items}:
        own = [item for item in items if item.modality.placeholder == token]
        marks = [torch.zeros(len(item), dtype=torch.bool, device=ids.device) for item in own]
        for item, mark in zip(own, marks, strict=True):
            mark[item.free.to(ids.device)] = True
        made[ids == token] = torch.cat(marks)
    return made


@timed("compact")
def shorten(
    ids: Tensor, valid: Tensor, items: Sequence[Item], selections: Sequence[Selection]
) -> Prompt:
    """Decides which prompt positions stay, in the order that the selections give the tokens.

    Padding stays on the side where it was; where nothing is dropped the prompt is left alone.
    """
    batch, length = ids.shape
    sample = rows_of(ids, items)
    every = torch.arange(length, device=ids.device).expand(batch, length)
    if all(s.is_identity for s in selections):
        index = every.masked_fill(~valid, -1)
        return Prompt(ids, valid, index, sample, selections, changed=False)
    source, stays = every.clone(), valid.clone()
    spots: dict[int, Tensor] = {}
    for item, row, selection in zip(items, sample, selections, strict=True):
        token = item.modality.placeholder
        left = spots.get(token)
        if left is None:
            left = (ids == token).nonzero()[:, 1]
            stays &= ids != token
        places, spots[token] = left[: selection.n], left[selection.n :]
        slots = selection.slots[0].to(ids.device)
        source[row, places[slots.sort().values]] = places[slots]
        stays[row, places[slots]] = True
    index = _pack(source, stays, right=_pads_right(valid))
    return Prompt(ids, valid, index, sample, selections, changed=True)


def _pads_right(valid: Tensor) -> bool:
    return bool((~valid[:, -1]).any()) and bool(valid[:, 0].all())


def _pack(source: Tensor, stays: Tensor, *, right: bool) -> Tensor:
    """Moves the positions that stay together: ``[B, L']``, padded with -1 on one side."""
    counts = stays.sum(1)
    longest = int(counts.max())
    order = torch.where(stays, 1, 0).argsort(dim=1, stable=True, descending=right)
    order = order[:, :longest] if right else order[:, order.shape[1] - longest :]
    return torch.where(stays.gather(1, order), source.gather(1, order), -1)


def gather_index(x: Tensor, index: Tensor, pad: int) -> Tensor:
    """Returns ``x`` ``[B, L]`` at ``index`` ``[B, L']``, ``pad`` where the index is -1."""
    return x.gather(1, index.clamp(min=0)).masked_fill(index < 0, pad)


def compact(
    prompt: Prompt, batch: Mapping[str, Any], positions: Tensor, policy: Positions, pad_id: int
) -> dict[str, Any]:
    """Returns ``batch`` with every per-token input cut to the short prompt.

    Args:
        positions: position ids of the full prompt, as ``gather_positions`` takes them.
        pad_id: token id for padding.
    """
    short = dict(batch)
    index = prompt.index
    short["input_ids"] = gather_index(prompt.ids, index, pad_id)
    short["attention_mask"] = (index >= 0).long()
    for name, pad in PER_TOKEN.items():
        if batch.get(name) is not None:
            short[name] = gather_index(batch[name], index, pad)
    short["position_ids"] = gather_positions(positions, index, policy)
    return short
