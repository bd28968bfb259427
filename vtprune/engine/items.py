"""Images, tiles and videos as the prompt has them: which tokens are to be chosen from.

Some visual tokens are made of no patch (newlines, the CLS of a frame). Strategies never see them;
they stay, or leave with the row that they end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vtprune.engine.timing import timed
from vtprune.errors import InputError, UnsupportedError
from vtprune.types import Mix, Newlines, Selection
from vtprune.vlm_adapters._base import Batch, Grid, Modality, VLMAdapter, square


@dataclass(frozen=True)
class Item:
    """One entry of an encoder's output.

    Attributes:
        tokens: ``[n, D]`` projected.
        grid: ``(t, h, w)`` of the free tokens, or None.
        free: ``[m]`` int64, positions of the tokens that a strategy may choose from.
        fixed: ``[n - m]`` int64, positions of the others.
        tiles: ``[m, 3]`` float64 on the CPU, of each free token its tile or frame, and its row and
            column there; None where a token is made of several tiles. Rows and columns are means
            where a token is made of several patches, 0 where tiles are not square.
    """

    modality: Modality
    tokens: Tensor
    grid: Grid | None
    free: Tensor
    fixed: Tensor
    tiles: Tensor | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def tile(self) -> Tensor:
        """Of which tile of an image each free token is, from 0, the base view; ``[m]`` float32."""
        if self.tiles is None or self.modality.name != "image":
            return torch.zeros(len(self.free), device=self.free.device)
        return (self.tiles[:, 0] - self.tiles[:, 0].min()).float().to(self.free.device)

    def describe(self, chosen: Selection) -> tuple[str, int, Grid | None]:
        """Returns what it is, how many tokens that no strategy sees are ``chosen``, its grid."""
        return self.modality.item, int(torch.isin(chosen.slots[0], self.fixed).sum()), self.grid


def items_of(adapter: VLMAdapter, modality: Modality, output: Any, batch: Batch) -> list[Item]:
    """Returns what the encoder's ``output`` holds.

    Raises:
        InputError: the connector carries patches to other numbers of tokens than the model made.
    """
    tokens = adapter.tokens(modality, output, batch)
    carried = [torch.zeros(len(x), 4, device="cpu") for x in tokens]
    if adapter.facts.vision_layers:
        probe = _places(adapter, modality, output.last_hidden_state, batch)
        carried = adapter.carry(modality, probe, batch)
    free = [~x[:, 0].isnan() for x in carried]
    if [len(x) for x in free] != [len(x) for x in tokens]:
        raise InputError(
            f"{adapter.facts.family}: {modality.pixels[0]} give {[len(x) for x in tokens]} visual "
            f"tokens, but their sizes say {[len(x) for x in free]}. Build all inputs with one "
            "processor."
        )
    grids = adapter.grids(modality, [int(f.sum()) for f in free], batch)
    return [
        Item(modality, x, grid, _at(f, x), _at(~f, x), _tiles(places[f]))
        for x, f, grid, places in zip(tokens, free, grids, carried, strict=True)
    ]


def _at(mask: Tensor, tokens: Tensor) -> Tensor:
    return mask.nonzero()[:, 0].to(tokens.device)


def _places(adapter: VLMAdapter, modality: Modality, states: Tensor, batch: Batch) -> Tensor:
    """Returns of each patch its tile, the square of that, its row and its column, ``[P, 4]``.

    In float64, which tells a mean of many tiles from a tile, on the CPU, where it is looked at.
    """
    lengths, side = adapter.segments(modality, batch), 0
    if lengths is None:
        width = states.shape[-2] - adapter.n_prefix
        lengths, grid = [width] * len(states), square(width)
        side = grid[1] if grid else 0
    sizes = torch.tensor(lengths, device="cpu")
    tile = torch.repeat_interleave(sizes)
    within = torch.arange(len(tile), device="cpu") - (sizes.cumsum(0) - sizes)[tile]
    row, column = (within // side, within % side) if side else (within * 0, within * 0)
    return torch.stack([tile, tile**2, row, column], dim=1).double()


def _tiles(carried: Tensor) -> Tensor | None:
    """Returns ``Item.tiles`` from what the connector made of ``_places``, ``[m, 4]``."""
    tile, squared = carried[:, 0], carried[:, 1]
    if bool((squared - tile**2 > 1e-6).any()):  # their variance: the token is of several tiles
        return None
    return torch.stack([tile.round(), carried[:, 2], carried[:, 3]], dim=1)


def n_patches(states: Tensor, n_prefix: int) -> int:
    """Patches in a tower's output ``[B, prefix + N, C]`` or ``[N, C]``."""
    return states.shape[:-1].numel() - n_prefix * states.shape[:-2].numel()


def sources(
    adapter: VLMAdapter, modality: Modality, n: int, batch: Batch, device: torch.device
) -> list[Tensor]:
    """Returns the patch that each token of each item is made of, ``[n_i]`` int64, -1 = none.

    Raises:
        UnsupportedError: a token is made of several patches.
    """
    ids = torch.arange(n, device=device, dtype=torch.float64)
    probe = torch.stack([ids, ids.sin()], dim=1)  # a mean of ids may be whole; that of sines not
    found = []
    for item in adapter.carry(modality, probe, batch):
        none = item.isnan().any(1)
        source = item[:, 0].nan_to_num().round().long().clamp(0, n - 1)
        if not bool((none | (probe[source] == item).all(1)).all()):
            raise UnsupportedError(
                f"{adapter.facts.family} makes a visual token of several patches here, so tokens "
                "cannot be reduced inside the tower. Use a strategy that acts after it."
            )
        found.append(source.masked_fill(none, -1))
    return found


def join(
    parts: Sequence[tuple[Selection, Tensor]], n: int, n_prefix: int = 0
) -> tuple[Selection, Tensor]:
    """Returns one selection of ``n`` tokens (batch 1) from selections of parts of them.

    Args:
        parts: selections (batch 1) with the position ``[N_p]`` of each of their tokens.
        n_prefix: tokens after those of each part that its mix may read, whether it does or not.

    Returns:
        The selection, in ascending order unless one part is everything, and ``[K]`` where its
        outputs are among those of all parts.
    """
    first, where = parts[0]
    if len(parts) == 1 and len(where) == n:
        return first, torch.arange(first.rows.shape[1], device=where.device)
    slots = torch.cat([where[part.slots[0]] for part, where in parts])
    order = slots.argsort()
    rows = slots[order][None]
    if all(part.mix is None for part, _ in parts):
        return Selection(rows, n), order
    place = order.argsort()
    edges, before, prefix = [], 0, n
    for part, where in parts:
        mix = part.mix or _copies(part)
        beyond = torch.arange(max(n_prefix, part.n_prefix), device=where.device)
        into = torch.cat([where, prefix + beyond])
        edges.append((into[mix.source[0]], place[before + mix.target[0]], mix.weight[0]))
        before, prefix = before + part.rows.shape[1], prefix + len(beyond)
    source, target, weight = (torch.cat(each)[None] for each in zip(*edges, strict=True))
    return Selection(rows, n, Mix(source, target, weight)), order


def _copies(part: Selection) -> Mix:
    """A plain gather as a mix."""
    target = torch.arange(part.rows.shape[1], device=part.rows.device)[None]
    return Mix(part.rows, target, torch.ones(target.shape, device=target.device))


@timed("compact")
def stand(
    item: Item, chosen: Selection, tokens: Tensor, policy: Newlines
) -> tuple[Selection, Tensor]:
    """Puts the fixed tokens back beside what was chosen of the free ones.

    Args:
        chosen: of the free tokens (batch 1); ``tokens`` ``[K, D]`` are its outputs.

    Returns:
        The selection of the whole item, and its outputs.
    """
    if not len(item.fixed):
        return chosen, tokens
    fixed = item.fixed
    if policy == "row":
        fixed = fixed[_rows_stand(item, item.free[chosen.slots[0]])]
    stays = Selection(torch.arange(len(fixed), device=fixed.device)[None], len(fixed))
    selection, order = join([(chosen, item.free), (stays, fixed)], len(item))
    return selection, torch.cat([tokens, item.tokens[fixed]])[order]


def _rows_stand(item: Item, kept: Tensor) -> Tensor:
    """Returns for each newline ``[n - m]`` bool whether a token of its row is among ``kept``.

    The first row is as long as the second: what is before it is a base view without newlines.
    """
    ends = item.fixed
    begins = torch.cat([ends.new_full((1,), -1), ends[:-1]]) + 1
    if len(ends) > 1:
        begins[0] = ends[0] - (ends[1] - begins[1])
    inside = (kept >= begins[:, None]) & (kept < ends[:, None])
    return inside.any(1)
