"""Hidden dimensions in which the sinks of a model are large, and where its sinks are.

The definition is that of VAR (arXiv 2503.03321): a token is a sink in a layer if, of what enters
it, one of these dimensions exceeds tau times the root mean square of all.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vtprune.engine.onlooker import Onlooker, Seen
from vtprune.errors import ConfigError
from vtprune.eval.analyze_stats import sinks_of
from vtprune.eval.budgets import split
from vtprune.scoring.sinks import EPS, sink_score

AUTO = "auto"
MASSIVE = 1000.0  # times the median: what arXiv 2402.17762 calls a massive activation
MOST = 8  # places that are listed

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Place:
    """Where sinks are.

    Attributes:
        where: a token of the text and its place, from the first one or, behind what is seen, from
            the last one; or row and column in the image, from 0.
        sink: share of samples and layers in which it is one, 0 to 1.
        attention: share of the rows' attention that it draws there; None where heads hold
            different tokens.
    """

    kind: str
    where: str
    sink: float
    attention: float | None


def parse_dims(text: str, width: int) -> tuple[bool, tuple[int, ...]]:
    """Returns whether dimensions are to be found, and those that are given.

    Raises:
        ConfigError: something in the list is no dimension.
    """
    words = split(text)
    for word in words:
        if word != AUTO and not (word.isdecimal() and int(word) < width):
            raise ConfigError(
                f"--sink-dims {text!r}: {word!r} is no dimension of a language model {width} wide. "
                f"Give numbers from 0 to {width - 1} with commas, or {AUTO!r} to have them found."
            )
    if not words:
        raise ConfigError(f"--sink-dims is empty. Give numbers with commas, or {AUTO!r}.")
    return AUTO in words, tuple(dict.fromkeys(int(w) for w in words if w != AUTO))


def score_of(dims: Sequence[int]) -> Callable[[Tensor], Tensor]:
    """Returns what scores hidden states ``[B, n, C]``; without dimensions nothing is a sink."""
    if not dims:
        return lambda hidden: hidden.new_zeros(hidden.shape[:2])
    return lambda hidden: sink_score(hidden, dims)


def discover(firsts: Tensor, tau: float) -> tuple[int, ...]:
    """Returns the dimensions that are large in the first token, ascending.

    Those above ``tau`` root mean squares in more than half of the middle layers, or above
    ``MASSIVE`` medians in more than half of all.

    Args:
        firsts: ``[NL, S, C]``, what enters each layer at the first token of each prompt.
    """
    x = firsts.float()
    over = (x.abs() * (x.square().mean(-1, keepdim=True) + EPS).rsqrt()).mean(1) > tau  # [NL, C]
    size = x.abs().mean(1)
    massive = size > MASSIVE * size.median(-1, keepdim=True).values
    layers = len(x)
    middle = over[layers // 4 : max(layers - layers // 4, 1)]
    often = (middle.float().mean(0) > 0.5) | (massive.float().mean(0) > 0.5)
    return tuple(often.nonzero()[:, 0].tolist())


@torch.inference_mode()
def first_tokens(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Returns what enters each layer at the first token of each prompt, ``[NL, B, C]``."""
    first = inputs["attention_mask"].long().argmax(1)
    found: list[Tensor] = []

    def score(hidden: Tensor) -> Tensor:
        at = first.to(hidden.device)
        found.append(hidden[torch.arange(len(at), device=at.device), at].float().cpu())
        return hidden[..., 0]

    with Onlooker(model, inputs, score).looking():
        model(**inputs, use_cache=False)
    return torch.stack(found)


class Places:
    """Counts where sinks are, over batches.

    Args:
        name: returns what the tokenizer calls an id.
    """

    def __init__(self, name: Callable[[int], str]) -> None:
        self.name = name
        self.chances = 0
        self._times: dict[tuple[str, str], int] = defaultdict(int)
        self._told: dict[tuple[str, str], int] = defaultdict(int)
        self._drawn: dict[tuple[str, str], float] = defaultdict(float)

    def add(self, seen: Seen, ids: Tensor, grids: Sequence[Grid | None], tau: float) -> None:
        """Takes one batch; ``ids`` ``[B, L]`` are of the prompts."""
        sinks = sinks_of(seen, tau)
        times, told = sinks.sum(0), sinks & ~(seen.mixed[:, None, None] & seen.visual)
        drawn, known = (seen.attention * told).sum(0), told.sum(0)
        self.chances += sinks.shape[0] * sinks.shape[1]
        for b, column in times.nonzero().tolist():
            key = self._where(seen, ids, grids[b], b, column)
            self._times[key] += int(times[b, column])
            self._told[key] += int(known[b, column])
            self._drawn[key] += float(drawn[b, column])

    def top(self) -> list[Place]:
        """Returns the places that are sinks most often, those that draw more first."""
        order = sorted(self._times, key=lambda key: (-self._times[key], -self._drawn[key], key))
        return [
            Place(*key, self._times[key] / self.chances, self._mean(key)) for key in order[:MOST]
        ]

    def _mean(self, key: tuple[str, str]) -> float | None:
        return self._drawn[key] / self._told[key] if self._told[key] else None

    def _where(
        self, seen: Seen, ids: Tensor, grid: Grid | None, b: int, column: int
    ) -> tuple[str, str]:
        spots = seen.visual[b].nonzero()[:, 0]
        if seen.visual[b, column]:
            number = int((spots < column).sum())
            if grid is None:
                return "visual", f"token {number}"
            frame, rest = divmod(number, grid[1] * grid[2])
            row, col = divmod(rest, grid[2])
            at = f"row {row}, column {col}"
            return "visual", at if grid[0] == 1 else f"frame {frame}, {at}"
        words = seen.valid[b].nonzero()[:, 0]
        number = int((words < column).sum())
        after = len(spots) > 0 and column > int(spots[-1])
        token = self.name(int(ids[b, column]))
        return "text", f"{token!r}, token {number - len(words) if after else number}"
