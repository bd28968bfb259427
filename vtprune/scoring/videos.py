"""Videos inside the language model: which tokens are left of them, and what these are made of.

N visual tokens of a sample, n of a video.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vtprune.errors import InputError
from vtprune.scoring.diversity import nearest
from vtprune.scoring.still import Made
from vtprune.types import Signals, Spans


@dataclass(frozen=True)
class Video:
    """What is left of a video.

    Attributes:
        places: ``[n]`` int64, ascending, among the tokens of the sample.
        pool: ``[n]`` int64; tokens made of the same frames have the same number, from 0 on.
        whole: how many tokens it had before any left.
    """

    places: Tensor
    pool: Tensor
    whole: int

    @property
    def sizes(self) -> list[int]:
        """How many tokens each pool has."""
        return torch.bincount(self.pool).tolist()


def videos(signals: Signals, row: int) -> tuple[list[Video], Tensor]:
    """Returns the videos of a sample, and its other visual tokens ``[m]`` int64, ascending.

    Raises:
        InputError: the signals do not say where in a model they are.
    """
    if signals.inside is None:
        raise InputError("Videos are told apart inside a model; signals.inside says where that is.")
    made = signals.stack(Spans)[-1][row].float().nan_to_num(0.0)
    number, of_video = made[:, 0].long(), made[:, 1] >= 0
    found = []
    for i in number[of_video].unique().tolist():
        places = (of_video & (number == i)).nonzero()[:, 0]
        pool = torch.unique(made[places, 1:], dim=0, return_inverse=True)[1]
        found.append(Video(places, pool, signals.inside.images[row][i]))
    return found, (~of_video).nonzero()[:, 0]


def running_means(places: Tensor, kept: Tensor, tokens: Tensor) -> Made:
    """Merges tokens of a video one by one, from the first on, into the kept ones most like them.

    Each time the kept one becomes the mean of what it is by then and the token.

    Args:
        places: ``[n]`` int64, ascending; kept: ``[k]`` of them, ascending; k from 1 on.
        tokens: ``[N, D]`` of the sample, whose cosine is compared as they were.
    """
    dropped = places[~torch.isin(places, kept)]
    into = nearest(tokens[dropped][None], tokens[kept][None])[0]
    joined = torch.bincount(into, minlength=len(kept))
    order = into.argsort(stable=True)
    turn = torch.empty_like(into)  # of each among those that go into the same
    first = joined.cumsum(0) - joined
    turn[order] = torch.arange(len(into), device=into.device) - first[into[order]]
    every = torch.arange(len(kept), device=kept.device)
    halvings = torch.cat([joined, joined[into] - turn])
    return Made(kept, torch.cat([kept, dropped]), torch.cat([every, into]), 0.5 ** halvings.float())
