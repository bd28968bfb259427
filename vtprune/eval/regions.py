"""Which patches of a picture became one token."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vtprune.types import Selection


def regions_of(selection: Selection, lit: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Returns per patch, in the shape of ``lit``, the number of its region, -1 = it has left.

    Where tokens merge, the patches of a token are a region, with that token which has most of
    them; where tokens only leave, all that stay are one.

    Args:
        selection: of one image, whose tokens lie in ``rows`` x ``cols``, or of a video.
        lit: ``[rows, cols]`` or ``[T, rows, cols]``, whose slot is still in use in the end.
    """
    mix = selection.mix
    if mix is None or selection.n != lit.size:
        return np.where(lit, 0, -1)
    source, target, weight = (
        part[0].cpu().numpy() for part in (mix.source, mix.target, mix.weight)
    )
    slots = selection.slots[0].cpu().numpy()
    owner = np.full(selection.n, -1)
    for edge in np.argsort(np.abs(weight), kind="stable"):  # the largest weight is written last
        if source[edge] < selection.n and lit.flat[slots[target[edge]]]:
            owner[source[edge]] = target[edge]
    return owner.reshape(lit.shape)


def moments_of(
    frames: NDArray[np.uint8], regions: NDArray[np.int64]
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Returns a video as one picture: the first frames of its moments side by side, and regions so.

    Args:
        frames: ``[F, H, W, 3]``.
        regions: ``[T, rows, cols]``, or ``[rows, cols]`` of a video of one moment.
    """
    moments = regions if regions.ndim == 3 else regions[None]
    first = frames[:: max(1, len(frames) // len(moments))][: len(moments)]
    seen = np.concatenate(list(first), axis=1).astype(np.float32) / np.float32(255)
    return seen, np.concatenate(list(moments), axis=1)


def merges(regions: NDArray[np.int64]) -> bool:
    """Whether a region is one token; where tokens only leave, all that stay are one region."""
    return bool((regions > 0).any())


def in_mean_color(seen: NDArray[np.float32], regions: NDArray[np.int64]) -> NDArray[np.float32]:
    """Returns the picture ``[H, W, 3]`` with the mean color of each region of several patches."""
    painted = seen.copy()
    spread = enlarged(regions, seen.shape)
    numbers, patches = np.unique(regions[regions >= 0], return_counts=True)
    for region in numbers[patches > 1]:
        mine = spread == region
        painted[mine] = seen[mine].mean(0)
    return painted


def enlarged(regions: NDArray[np.int64], size: tuple[int, ...]) -> NDArray[np.int64]:
    """Returns the region of each pixel of a picture of ``size`` (height, width)."""
    rows = np.arange(size[0]) * regions.shape[0] // size[0]
    cols = np.arange(size[1]) * regions.shape[1] // size[1]
    return regions[rows][:, cols]
