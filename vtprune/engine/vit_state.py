"""What has become of the patches of a batch between two blocks of a ViT."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from vtprune.errors import UnsupportedError
from vtprune.kernels.gather_tokens import gather_tokens
from vtprune.types import Maps, Mix, Selection, TowerNeed


@dataclass(frozen=True)
class State:
    """What has become of the patches.

    Attributes:
        index: ``[B, n]`` int64, the patch whose place each token has; None = nothing happened.
        owner: ``[B, N]`` int64, the token that each patch is in, -1 = it has left.
        sizes: ``[B, n]`` float32, how many patches each token stands for; None = one each. 0 where
            a token only fills its row up.
        proportional: whether tokens get attention for all patches they stand for.
        padded: whether rows have been filled up.
        values: quantities of earlier blocks, ``[B, n, ...]``.
        guests: ``[B, g, C]`` tokens that a strategy adds between prefix and patches.
        tokens: by name what rules of attention left with each token, ``[B, S, ...]``, the prefix
            first; rows: with each image, ``[B, ...]``.
    """

    index: Tensor | None = None
    owner: Tensor | None = None
    sizes: Tensor | None = None
    proportional: bool = False
    padded: bool = False
    values: tuple[tuple[TowerNeed, Tensor], ...] = ()
    guests: Tensor | None = None
    tokens: Mapping[str, Tensor] = field(default_factory=dict)
    rows: Mapping[str, Tensor] = field(default_factory=dict)

    def after(self, chosen: Selection, proportional: bool, padded: bool = False) -> State:
        """Returns the state after a selection among the tokens."""
        rows, into, lasting = chosen.slots, _into(chosen), self.lasting
        sizes = self.sizes
        if sizes is None and not (chosen.mix is None and chosen.sizes is None):
            sizes = torch.ones(into.shape, device=into.device)
        owner = into
        if self.owner is not None:
            owner = into.gather(1, self.owner.clamp(min=0)).masked_fill(self.owner < 0, -1)
        left = gather_tokens(rows, *(value for _, value in lasting))
        return State(
            rows if self.index is None else self.index.gather(1, rows),
            owner,
            None if sizes is None else chosen.counted(sizes),
            proportional,
            self.padded or padded,
            tuple((need, value) for (need, _), value in zip(lasting, left, strict=True)),
            self.guests,
            {name: _follow(rows, left, chosen.n) for name, left in self.tokens.items()},
            self.rows,
        )

    def reading(self, values: Iterable[tuple[TowerNeed, Tensor]]) -> State:
        """Returns the same with more quantities."""
        return replace(self, values=(*self.values, *values))

    @property
    def lasting(self) -> tuple[tuple[TowerNeed, Tensor], ...]:
        """Those of ``values`` that have something for each token."""
        return tuple((need, value) for need, value in self.values if not isinstance(need, Maps))

    def factors(self, length: int) -> Tensor | None:
        """Returns how many patches each of ``length`` tokens stands for, the prefix 1 each.

        None where it is 1 for all.

        Returns:
            ``[B, length]`` float32.
        """
        if self.sizes is None:
            return None
        return pad(self.sizes, (length - self.sizes.shape[1], 0), value=1.0)

    def lengths(self) -> list[int] | None:
        """Returns per image how many tokens do not only fill its row up; None = all."""
        return (self.sizes > 0).sum(1).tolist() if self.padded and self.sizes is not None else None


def _follow(rows: Tensor, left: Tensor, n: int) -> Tensor:
    """Returns what was left with tokens for the prefix and those of ``n`` that stay."""
    p = left.shape[1] - n
    return torch.cat([left[:, :p], gather_tokens(rows, left[:, p:])[0]], dim=1)


def _into(chosen: Selection) -> Tensor:
    """Returns the output that each token goes into, ``[B, n]`` int64, -1 = none."""
    batch, k = chosen.rows.shape
    device = chosen.rows.device
    into = torch.full((batch, chosen.n + 1), -1, device=device)
    if chosen.mix is not None:
        source, target = chosen.mix.source, chosen.mix.target
    else:
        source, target = chosen.rows, torch.arange(k, device=device).expand(batch, k)
    if chosen.sizes is not None:  # what fills a row up takes nothing in
        source = source.masked_fill(chosen.sizes.gather(1, target) <= 0, chosen.n)
    return into.scatter(1, source, target)[:, : chosen.n]


def added(state: State, q: Tensor) -> Tensor | None:
    """Returns what keys get added, ``[B, 1, 1, S]`` in the dtype of ``q``, or None."""
    factors = state.factors(q.shape[2]) if state.proportional or state.padded else None
    if factors is None:
        return None
    seen = factors if state.proportional else (factors > 0).float()
    return seen.log().to(q.dtype)[:, None, None]


def left_of(rope: Tensor, index: Tensor | None) -> Tensor:
    """Returns the rotary embedding of the tokens that are left.

    Args:
        rope: ``[N, e]``, or ``[H, N, e]`` where heads have their own.
        index: ``[B, n]`` patches, None = all.

    Raises:
        UnsupportedError: it has other dimensions.
    """
    if index is None:
        return rope
    if rope.ndim == 2:
        return rope[index][:, None]
    if rope.ndim == 3:
        return rope[:, index].transpose(0, 1)
    raise UnsupportedError(
        f"The rotary embedding is {list(rope.shape)}; known are [N, e] and [H, N, e]. Give images "
        "of one size."
    )


def selections(state: State, batch: int, n: int) -> list[Selection]:
    """Returns per image what is left of its ``n`` patches, in the order of their places."""
    if state.index is None or state.owner is None:
        return [Selection.all(1, n, torch.device("cpu"))] * batch
    lengths: Any = state.lengths() or [state.index.shape[1]] * batch
    rows = zip(state.index, state.owner, lengths, strict=True)
    return [_selection(index[:length], owner) for index, owner, length in rows]


def _selection(index: Tensor, owner: Tensor) -> Selection:
    rows, order = index.sort()
    place = order.argsort()
    source = (owner >= 0).nonzero()[:, 0]
    if len(source) == len(rows):
        return Selection(rows[None], len(owner))
    target = place[owner[source]]
    weight = 1 / torch.bincount(target, minlength=len(rows)).float()[target]
    return Selection(rows[None], len(owner), Mix(source[None], target[None], weight[None]))
