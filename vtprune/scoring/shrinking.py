"""A frame made smaller: by some of its tokens, by merging, or by a smaller picture of it.

N tokens of a frame in a raster of ``grid`` ``(h, w)``, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor

from vtprune.scoring.matching import ascending, averaged, merge_down
from vtprune.scoring.still import Made, copied

Grid = tuple[int, int]
Resize = Callable[[Tensor, Grid], Tensor]


def rectangle(n: int, grid: Grid) -> Grid:
    """Returns the rows and columns of a picture of at most ``n`` tokens, in proportion to ``grid``.

    It is no larger than ``grid``, with so many rows or one more, whichever leaves less over.
    """
    most, columns = grid
    rows = max(1, min(most, isqrt(n * most // columns)))
    sizes = [(high, min(columns, n // high)) for high in (rows, min(most, rows + 1, n))]
    return max(sizes, key=lambda size: size[0] * size[1])


def area(n: int, grid: Grid) -> int:
    """Returns how many tokens such a picture has, 0 of 0."""
    rows, columns = rectangle(n, grid) if n else (0, 0)
    return rows * columns


def spread_out(x: Tensor, grid: Grid, n: int) -> Made:
    """Takes ``n`` of the tokens ``[N, D]`` at even distances, the first and the last among them."""
    places = [i * (len(x) - 1) // max(1, n - 1) for i in range(n)]
    return copied(torch.tensor(places, device=x.device))


def merged(x: Tensor, grid: Grid, n: int) -> Made:
    """Merges the most similar pairs of the tokens ``[N, D]`` until ``n`` are left, as ToMe does."""
    every = torch.arange(len(x), device=x.device)
    if n == len(x):
        return copied(every)
    size = torch.ones(1, len(x), device=x.device)
    made = averaged(*ascending(*merge_down(x[None], size, n)), size)
    assert made.mix is not None
    return Made(made.rows[0], made.mix.source[0], made.mix.target[0], made.mix.weight[0])


def interpolated(x: Tensor, grid: Grid, n: int) -> Made:
    """Makes a smaller picture by bilinear interpolation between the tokens ``[N, D]``."""
    return _resized(
        grid, n, x, lambda one, size: F.interpolate(one, size, mode="bilinear", align_corners=False)
    )


def pooled(x: Tensor, grid: Grid, n: int) -> Made:
    """Makes a smaller picture of the means of patches of the tokens ``[N, D]``."""
    return _resized(grid, n, x, lambda one, size: F.adaptive_avg_pool2d(one, size))


def _resized(grid: Grid, n: int, x: Tensor, resize: Resize) -> Made:
    """Returns what ``resize`` makes of pictures ``[N, 1, h, w]`` of one token each, as edges."""
    size = rectangle(n, grid)
    ones = torch.eye(len(x), device=x.device).view(len(x), 1, *grid)
    weights = resize(ones, size).flatten(1).T  # [n, N]
    target, source = weights.nonzero(as_tuple=True)
    rows, columns = (
        (2 * torch.arange(few, device=x.device) + 1) * many // (2 * few)
        for few, many in zip(size, grid, strict=True)
    )
    places = (rows[:, None] * grid[1] + columns).flatten()
    return Made(places, source, target, weights[target, source])


SHRINKING: dict[str, Callable[[Tensor, Grid, int], Made]] = {
    "linspace": spread_out,
    "tome": merged,
    "interpolate": interpolated,
    "pool": pooled,
}
RECTANGLES = ("interpolate", "pool")  # these may make fewer tokens than they are asked for
