"""What is left of a prompt from one layer on, and what the model hands to a layer, cut to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vtprune.kernels.gather_tokens import gather_tokens
from vtprune.kernels.scatter_tokens import scatter_tokens

Rotary = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Cut:
    """Columns of a prompt that a layer sees.

    Attributes:
        index: ``[B, n]`` columns of the prompt, ascending; -1 = padding, on the left. Of a cache
            also of what was decoded, in any order, and with padding anywhere.
        length: columns of the prompt, and of what was decoded of which ``index`` knows.
        moved: ``[B, n]`` by how much each position id is lowered, and ``behind`` ``[B]`` those of
            the tokens after the prompt; None = ids stay.
        padded: whether rows differ in length.
    """

    index: Tensor
    length: int
    moved: Tensor | None = None
    behind: Tensor | None = None
    padded: bool = False

    @classmethod
    def whole(cls, valid: Tensor) -> Cut:
        """Everything: ``valid`` ``[B, L]`` bool marks the tokens among the columns."""
        columns = torch.arange(valid.shape[1], device=valid.device).expand(valid.shape)
        return cls(columns.masked_fill(~valid, -1), valid.shape[1])

    def to(self, device: torch.device) -> Cut:
        """Returns the same on ``device``."""
        moved, behind = (None if x is None else x.to(device) for x in (self.moved, self.behind))
        return replace(self, index=self.index.to(device), moved=moved, behind=behind)

    @property
    def valid(self) -> Tensor:
        return self.index >= 0

    def rows(self, index: Tensor) -> Cut:
        """Returns the same of some rows; ``index`` ``[b]`` int64."""
        moved, behind = (None if x is None else x[index] for x in (self.moved, self.behind))
        return replace(self, index=self.index[index], moved=moved, behind=behind)

    def of(self, mask: Tensor) -> Tensor:
        """Returns ``mask`` ``[B, L]`` bool of the prompt at these columns, ``[B, n]``."""
        return self.valid & mask.gather(1, self.index.clamp(min=0))

    def keep(self, stays: Tensor, valid: Tensor, *, renumber: bool) -> Cut:
        """Returns what is left when only ``stays`` ``[B, n]`` do; ``valid`` as in ``whole``."""
        counts = stays.sum(1)
        n = int(counts.max())
        order = stays.long().argsort(dim=1, stable=True)[:, -n:]
        index = torch.where(stays.gather(1, order), self.index.gather(1, order), -1)
        moved = behind = None
        if renumber:
            rank = valid.long().cumsum(1) - 1
            place = (index >= 0).long().cumsum(1) - 1
            moved = (rank.gather(1, index.clamp(min=0)) - place).masked_fill(index < 0, 0)
            behind = valid.sum(1) - counts
        return Cut(index, self.length, moved, behind, bool((counts < n).any()))

    def spread(self, x: Tensor, length: int) -> Tensor:
        """Returns ``x`` ``[B, n, ...]`` at its columns of the prompt, ``[B, length, ...]``.

        Zeros elsewhere.
        """
        return scatter_tokens(self.index, (x, x.new_zeros(len(x), length, *x.shape[2:])))[0]

    def gather(self, hidden: Tensor, before: Cut) -> Tensor:
        """Returns ``hidden`` ``[B, m, D]``, which has the columns of ``before``, cut to these."""
        where = before.spread(
            torch.arange(hidden.shape[1], device=hidden.device).expand(before.index.shape),
            self.length,
        )
        return gather_tokens(where.gather(1, self.index.clamp(min=0)), hidden)[0]

    def prompt(self, kwargs: dict[str, Any], hidden: Tensor, rotary: Rotary) -> dict[str, Any]:
        """Returns a layer's arguments for the prompt itself."""
        cut = {**kwargs, "position_ids": None}
        cut["position_embeddings"] = self._embeddings(kwargs, hidden, rotary)
        mask = kwargs.get("attention_mask")
        cut["attention_mask"] = self.prompt_mask(mask, is_static(kwargs))
        return cut

    def _embeddings(
        self, kwargs: dict[str, Any], hidden: Tensor, rotary: Rotary
    ) -> tuple[Tensor, Tensor]:
        index = self.index.clamp(min=0)
        if self.moved is None:
            return _rows(kwargs["position_embeddings"], index)
        ids = kwargs["position_ids"].expand(len(index), -1).gather(1, index) - self.moved
        return rotary(hidden, ids)

    def step(self, kwargs: dict[str, Any], seen: int, rotary: Rotary) -> dict[str, Any]:
        """Returns a layer's arguments for tokens decoded now, with ``seen`` after ``length``."""
        cut = {**kwargs, "position_ids": None}
        cos, _ = kwargs["position_embeddings"]
        if self.behind is not None:
            ids = kwargs["position_ids"].expand(len(self.index), -1) - self.behind[:, None]
            cut["position_embeddings"] = rotary(cos, ids)
        mask = kwargs.get("attention_mask")
        now = seen + cos.shape[1]
        if mask is None and self.padded:
            mask = self._after(seen, cos.shape[1])
        elif mask is not None and not is_static(kwargs) and mask.shape[-1] < self.length + now:
            # Sized by a layer that is cut already: the columns it hides are not the right ones.
            seen_now = self._after(seen, cos.shape[1])
            mask = seen_now if mask.dtype == torch.bool else additive(seen_now, mask.dtype)
        elif mask is not None:
            mask = self._columns(mask, is_static(kwargs))
        cut["attention_mask"] = mask
        return cut

    def prompt_mask(self, mask: Tensor | None, static: bool = False) -> Tensor | None:
        """Returns a mask of the prompt at these rows and columns, None where order says it all."""
        if mask is None and not self.padded:
            return None  # order is kept, so causal stays causal
        valid, n = self.valid, self.index.shape[1]
        itself = torch.eye(n, dtype=torch.bool, device=valid.device)
        if mask is None:
            seen = torch.ones(n, n, dtype=torch.bool, device=valid.device).tril()
            return (seen & valid[:, None, :] | itself)[:, None]
        if mask.ndim == 2:
            return self._columns(mask, static)
        rows = self.index.clamp(min=0)[:, None, :, None]
        mask = mask.expand(len(rows), -1, -1, -1)
        mask = mask.gather(2, rows.expand(-1, mask.shape[1], -1, mask.shape[3]))
        mask = self._columns(mask, static)
        lone = ~valid[:, None, :, None] & F.pad(itself, (0, mask.shape[-1] - n))
        return mask.masked_fill(lone, True if mask.dtype == torch.bool else 0.0)

    def _after(self, seen: int, new: int) -> Tensor:
        """Visible columns ``[B, 1, new, n + seen + new]`` where the model itself masks nothing."""
        device = self.index.device
        total = seen + new
        later = torch.ones(new, total, dtype=torch.bool, device=device).tril(seen)
        ours = self.valid[:, None, :].expand(-1, new, -1)
        return torch.cat([ours, later.expand(len(ours), -1, -1)], dim=-1)[:, None]

    def _columns(self, mask: Tensor, static: bool) -> Tensor:
        """Cuts the prompt's columns of a 2-D mask, or of a 4-D mask, bool or additive.

        With a ``static`` cache a 4-D mask is as long as the cache, and stays so.
        """
        if mask.ndim == 2:
            ours = mask[:, : self.length].gather(1, self.index.clamp(min=0)) * self.valid
            return torch.cat([ours.to(mask.dtype), mask[:, self.length :]], dim=1)
        hidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        index = self.index[:, None, None].expand(-1, *mask.shape[1:3], -1)
        mask = mask.expand(len(index), -1, -1, -1)
        ours = mask[..., : self.length].gather(3, index.clamp(min=0))
        cut = torch.cat([ours.masked_fill(index < 0, hidden), mask[..., self.length :]], dim=-1)
        return F.pad(cut, (0, mask.shape[-1] - cut.shape[-1]), value=hidden) if static else cut


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns what is added to attention where only ``seen`` is seen."""
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return mask.masked_fill(~seen, torch.finfo(dtype).min)


def is_static(kwargs: dict[str, Any]) -> bool:
    """Returns whether the cache has a fixed length."""
    return bool(getattr(kwargs.get("past_key_values"), "is_compileable", False))


def _rows(embeddings: tuple[Tensor, Tensor], index: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = gather_tokens(index, *(x.expand(len(index), -1, -1) for x in embeddings))
    return cos, sin
