"""Where visual tokens are in their images, and which of them are close to each other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vtprune.engine.items import Item
from vtprune.errors import UnsupportedError
from vtprune.selection import Selection


def places(ids: Tensor, items: Sequence[Item]) -> Tensor:
    """Returns image, tile or frame, row and column of each token, ``[B, L, 4]`` float32.

    -1 for what is made of no patch. ``ids`` ``[B, L]`` hold the placeholders of ``items``.

    Raises:
        UnsupportedError: the tokens of an image form no grid.
    """
    return spread([_of(i, item) for i, item in enumerate(items)], ids, items, -1.0)


def spread(values: Sequence[Tensor], ids: Tensor, items: Sequence[Item], other: float) -> Tensor:
    """Returns ``values`` of the tokens of each item at their places in ``ids``, ``[B, L, C]``.

    Args:
        values: ``[n_i, C]`` each.
        ids: ``[B, L]`` with as many placeholders as there are values.
        other: what stands elsewhere.
    """
    found = values[0].new_full((*ids.shape, values[0].shape[1]), other, device=ids.device)
    for token in {item.modality.placeholder for item in items}:
        own = [v for v, i in zip(values, items, strict=True) if i.modality.placeholder == token]
        found[ids == token] = torch.cat(own).to(ids.device)
    return found


def spans(
    ids: Tensor, items: Sequence[Item], sample: Sequence[int], selections: Sequence[Selection]
) -> Tensor:
    """Returns what visual tokens are made of, ``[B, L, 3]`` as ``Spans`` has it, NaN elsewhere.

    Args:
        ids: as of ``places``; sample: row of each item.
        selections: of each item; a token stands where its slot is.
    """
    values = []
    for i, (item, made) in enumerate(zip(items, selections, strict=True)):
        values.append(_span(sample[:i].count(sample[i]), item, made))
    return spread(values, ids, items, torch.nan)


def _span(number: int, item: Item, made: Selection) -> Tensor:
    """Returns number, first and last frame of the tokens of an item, ``[n, 3]``."""
    out = torch.full((len(item), 3), torch.nan, device=item.free.device)
    out[item.free, 0] = number
    frames = 1 if item.grid is None else item.grid[0]
    each = torch.arange(len(item.free), device=item.free.device) // (len(item.free) // frames)
    out[item.free, 1:] = -1.0 if frames == 1 else each[:, None].float()
    if made.mix is None or frames == 1:
        return out
    own = made.mix.source[0] < made.n
    source, target = made.mix.source[0, own], made.mix.target[0, own]
    merged = out[made.slots[0]]
    for column, most in ((1, "amin"), (2, "amax")):
        read = out[source, column]
        merged[:, column] = merged[:, column].scatter_reduce(
            0, target, read, most, include_self=False
        )
    out[made.slots[0]] = merged
    return out


def _of(number: int, item: Item) -> Tensor:
    """Returns the places of the tokens of an item, ``[n, 4]``."""
    out = torch.full((len(item), 4), -1.0)
    free = item.free.cpu()
    if item.grid is not None:
        frames, height, width = item.grid
        axes = [torch.arange(n).float() for n in (frames, height, width)]
        out[free, 1:] = torch.cartesian_prod(*axes)
    elif item.tiles is not None:
        out[free, 1:] = torch.cat([item.tiles[:, :1], _steps(item.tiles[:, 1:])], 1).float()
    else:
        raise UnsupportedError(
            f"The tokens of this {item.modality.item} form no grid, so none has neighbours. Leave "
            "the window out (window=None)."
        )
    out[free, 0] = number
    return out


def _steps(patches: Tensor) -> Tensor:
    """Returns rows and columns counted in tokens, from those in patches, ``[m, 2]``."""
    columns = []
    for axis in patches.unbind(1):
        distinct = axis.unique()
        step = float(distinct.diff().min()) if len(distinct) > 1 else 1.0
        columns.append(((axis - distinct[0]) / step).round())
    return torch.stack(columns, dim=1)


def near(places: Tensor, radius: int) -> Tensor:
    """Returns which tokens are close to each other in one image or frame, ``[B, L, L]`` bool."""
    apart = (places[:, :, None] - places[:, None]).abs()
    close = (apart[..., :2] == 0).all(-1) & (apart[..., 2:] <= radius).all(-1)
    itself = torch.eye(places.shape[1], dtype=torch.bool, device=places.device)
    return (close & (places[:, :, None, 0] >= 0)) | itself
