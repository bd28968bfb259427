"""Position ids of a shortened prompt, and of what is decoded after it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vtprune.errors import InputError
from vtprune.types import Positions


def gather_positions(positions: Tensor, index: Tensor, policy: Positions) -> Tensor:
    """Returns the ids of the short prompt; padding gets 0.

    Args:
        positions: ``[B, L]``, the full prompt's, or ``[3, B, L]`` with an axis each for time,
            height and width, or ``[4, B, L]`` with a count of tokens before these.
        index: ``[B, L']``, -1 = padding.
        policy: ``keep`` gathers the original ids, ``renumber`` counts the survivors from 0.

    Returns:
        ``[B, L']``, or ``[4, B, L']`` whose first row counts the survivors: transformers tells
        packed sequences by it.
    """
    valid = index >= 0
    count = (valid.long().cumsum(1) - 1).clamp(min=0)
    if positions.ndim == 3:
        axes = positions[-3:]
        kept = axes.expand(-1, len(index), -1).gather(2, index.clamp(min=0).expand(3, -1, -1))
        return torch.cat([count[None], kept.masked_fill(~valid, 0)])
    if policy == "renumber":
        return (count + positions.min()).masked_fill(~valid, 0)
    kept = positions.expand(index.shape[0], -1).gather(1, index.clamp(min=0))
    return kept.masked_fill(~valid, 0)


@dataclass(frozen=True)
class Continuation:
    """What a manual decode loop needs after a shortened prefill; it rides on the cache.

    Attributes:
        index: ``[B, L']`` source positions, -1 = padding.
        length: L, the caller's idea of the prompt's length.
        following: ``[B]`` position id of the first decoded token.
        shift: ``[B]`` what to take off the caller's own position ids.
    """

    index: Tensor
    length: int
    following: Tensor
    shift: Tensor

    @classmethod
    def after(cls, index: Tensor, full: Tensor, short: Tensor) -> Continuation:
        """Reads the last ids off the position ids of the full and of the short prompt."""
        expected, following = (_last(ids) + 1 for ids in (full, short))
        return cls(index, full.shape[-1], following, expected - following)

    def resume(self, batch: Mapping[str, Any], seen: int) -> dict[str, Any]:
        """Returns the inputs of a decode step, re-cut to a cache that holds ``seen`` tokens.

        Raises:
            InputError: the attention mask fits neither the full nor the short length.
        """
        short = dict(batch)
        done = seen - self.index.shape[1]
        step = batch["input_ids"].shape[1]
        short["attention_mask"] = self._mask(batch.get("attention_mask"), done + step)
        if batch.get("position_ids") is not None:
            short["position_ids"] = batch["position_ids"] - self.shift[:, None]
        else:
            ahead = torch.arange(done, done + step, device=self.following.device)
            short["position_ids"] = self.following[:, None] + ahead
        return short

    def _mask(self, mask: Tensor | None, new: int) -> Tensor:
        valid = (self.index >= 0).long()
        if mask is None:
            return torch.cat([valid, valid.new_ones(len(valid), new)], dim=1)
        # The full prompt's mask first: both may have one length, and only the tail is the same.
        if mask.ndim == 2 and mask.shape[1] == self.length + new:
            return torch.cat([valid, mask[:, self.length :].to(valid.dtype)], dim=1)
        if mask.ndim == 2 and mask.shape[1] == self.index.shape[1] + new:
            return mask
        raise InputError(
            f"attention_mask has shape {tuple(mask.shape)}; after this shortened prompt it must be "
            f"[B, {self.length + new}], the full prompt and {new} decoded tokens, or None."
        )


def _last(positions: Tensor) -> Tensor:
    """The highest id of each row, ``[B]``; a count of tokens before three axes is none."""
    return positions[-3:].amax((0, 2)) if positions.ndim == 3 else positions.amax(1)
