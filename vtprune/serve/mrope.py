"""Position ids with three axes (M-RoPE) of a prompt from which visual tokens were left out.

Tokens that stay keep the ids that they had: those of text count on from the largest id before them
over the whole grid of an image, not over what stays of it. Which tokens stay is known only once an
image is encoded, so each brings its place along in channels of its embedding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

CHANNELS = 4
_BASE = 256  # bfloat16 holds whole numbers up to it


def laid_out(length: int, images: Sequence[tuple[int, int, int, int]]) -> tuple[Tensor, int]:
    """Returns the ids of a prompt before its images are encoded.

    Args:
        length: N, its tokens with the images' that stay.
        images: of each, in order, its 0-based first token, the tokens that stay, and the rows and
            columns of its whole grid.

    Returns:
        ``[3, N]`` int64, where all tokens of an image have the id of its upper left corner, and
        what to add to the number of a decoded token.
    """
    ids = torch.empty(length, dtype=torch.int64)
    done = following = 0
    for first, kept, rows, columns in images:
        ids[done:first] = torch.arange(following, following + first - done)
        following += first - done
        ids[first : first + kept] = following
        following += max(rows, columns)
        done = first + kept
    ids[done:] = torch.arange(following, following + length - done)
    return ids.repeat(3, 1), following + length - done - length


def with_places(tokens: Tensor, kept: Tensor, rows: int, columns: int) -> Tensor:
    """Appends to an image's tokens ``[K, D]`` where they were: ``[K, D + CHANNELS]``.

    The only token of an image has the ids of text and no place; that is -1.

    Args:
        kept: ``[K]`` int64, their 0-based number in the whole grid, row by row.
        rows, columns: of that grid.
    """
    row, column = kept // columns, kept % columns
    digits = torch.stack([row // _BASE, row % _BASE, column // _BASE, column % _BASE], dim=1)
    if rows == columns == 1:
        digits -= 1
    return torch.cat([tokens, digits.to(tokens)], dim=1)


def placed(
    ids: Tensor, placeholder: int, positions: Tensor, images: Sequence[Tensor], first: int
) -> tuple[list[Tensor], Tensor, int]:
    """Puts tokens that were encoded where they belong.

    Args:
        ids: ``[N]`` of the prompt.
        placeholder: stands for a visual token among them.
        positions: ``[3, N]`` as ``laid_out`` made them, or as this function left them.
        images: tokens ``[k, D + CHANNELS]``, the next ones from prompt token ``first`` on.

    Returns:
        The tokens ``[k, D]``, the positions, and what to add to the number of a decoded token.
    """
    tokens = [image[:, :-CHANNELS] for image in images]
    if images:
        places = torch.cat([image[:, -CHANNELS:] for image in images])
        digits = places.to(positions.device).long()
        digits = digits[digits[:, 0] >= 0]
        found = visual(ids.to(positions.device), placeholder, positions[0])
        where = found[found >= first][: len(digits)]
        positions = positions.clone()
        positions[1, where] = positions[0, where] + digits[:, 0] * _BASE + digits[:, 1]
        positions[2, where] = positions[0, where] + digits[:, 2] * _BASE + digits[:, 3]
    return tokens, positions, int(positions.max()) + 1 - len(ids)


def visual(ids: Tensor, placeholder: int, positions: Tensor) -> Tensor:
    """Returns which prompt tokens are an image's, ``[n]`` int64, ascending.

    A placeholder that somebody wrote into the text stands for none. The first axis has one id for
    all tokens of an image, and a leap after the last of them; in text it counts on. An image of one
    token in all is not told from text, and what ends a prompt may be either.

    Args:
        positions: ``[N]``, the first axis.
    """
    steps = positions.diff()
    begins, ends = steps.new_ones(1), steps.new_zeros(1)
    stands = torch.cat([begins, steps]) == 0
    leaps = torch.cat([steps, ends]) != 1
    return ((ids == placeholder) & (stands | leaps)).nonzero()[:, 0]
