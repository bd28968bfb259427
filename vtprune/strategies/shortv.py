"""ShortV: freeze visual tokens in the layers that do least to them.

In many layers of the language model visual tokens hardly change what is answered. There they stay
as they are: no queries, no attention, no MLP; their keys and values are made as ever, and text sees
them. arXiv 2504.00502 (icip-cas/ShortV), without training. Which layers those are is measured per
model: the authors did for LLaVA-1.5 and LLaVA-NeXT with 32 and 40 layers, ``vtprune calibrate``
does for any; the shipped models come with theirs. Models of another depth take the place of the
nearest layer of LLaVA-1.5's 32, first on first and last on last. Defaults: official code.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

from vtprune.errors import ConfigError
from vtprune.strategies._compute import Compute
from vtprune.types import Facts, RowRule

FILE = "shortv.json"  # what ``vtprune calibrate`` writes, in a model's folder
# The authors' layers in the order of their replacement, by depth; the others never were replaced.
LLAVA = {
    32: (31, 29, 30, 28, 0, 26, 27, 25, 24, 22, 23, 21, 2, 3, 20, 18, 17, 12, 19),
    40: (
        *(39, 32, 28, 36, 27, 37, 29, 30, 1, 38, 25, 31),
        *(2, 26, 23, 34, 0, 33, 35, 22, 24, 21, 20, 17),
    ),
}
NEXT = {
    32: (31, 29, 30, 28, 26, 27, 22, 24, 21, 23, 25, 20, 19, 17, 18, 15, 12, 0, 2),
    40: (
        *(39, 32, 29, 36, 27, 30, 37, 23, 25, 31, 26, 2),
        *(28, 22, 33, 35, 34, 24, 38, 21, 20, 18, 1, 17),
    ),
}


@dataclass(frozen=True)
class ShortV(Compute):
    """``replaced`` layers, a number or a share of all, the first of ``order``; or ``layers``.

    The order is by default that of ``shortv.json`` in the folder that the model was loaded from,
    else the authors'.
    """

    replaced: int | float = 0.6
    order: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        whole = isinstance(self.replaced, int) and not isinstance(self.replaced, bool)
        if not (whole and self.replaced >= 1) and not (
            isinstance(self.replaced, float) and 0 < self.replaced <= 1
        ):
            raise ConfigError(
                f"replaced={self.replaced!r} is neither a number of layers from 1 on nor a share "
                "above 0.0 and up to 1.0."
            )

    def beside(self, folder: str) -> ShortV:
        here = Path(folder, FILE)
        if self.order is not None or not folder or not here.is_file():
            return self
        try:
            order = json.loads(here.read_text(encoding="utf-8"))["order"]
            return replace(self, order=tuple(map(int, order)))
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(
                f"{here} holds no order of layers. Write it again: 'vtprune calibrate shortv'."
            ) from error

    def default_layers(self, facts: Facts) -> tuple[int, ...]:
        depth = facts.decoder_layers
        listed, of = (self.order, depth) if self.order is not None else authors(facts)
        if bad := [layer for layer in listed if not 0 <= layer < of]:
            raise ConfigError(
                f"order= names layers {bad}; {facts.family} has {depth}. It is of another model: "
                "measure this one's with 'vtprune calibrate shortv'."
            )
        ranked = placed(listed, of, depth)
        if isinstance(self.replaced, int):
            n, too_many = self.replaced, self.replaced > len(ranked)
        else:
            n, too_many = round(self.replaced * depth), round(self.replaced * of) > len(listed)
        if too_many and self.layers is None:
            raise ConfigError(
                f"replaced={self.replaced}: of these {depth} layers only {len(ranked)} have an "
                "order. Give at most those, or layers=; 'vtprune calibrate shortv' orders all."
            )
        return tuple(sorted(ranked[: max(1, n)]))

    def rule(self, layer: int, facts: Facts) -> RowRule:
        return RowRule(attend="none", mlp=0.0)


def authors(facts: Facts) -> tuple[tuple[int, ...], int]:
    """Returns the authors' order for the model nearest to this one, and that model's depth."""
    orders = NEXT if facts.family.startswith("LLaVA-NeXT") else LLAVA
    depth = facts.decoder_layers if facts.decoder_layers in orders else 32
    return (orders if facts.decoder_layers in orders else LLAVA)[depth], depth


def placed(listed: tuple[int, ...], of: int, depth: int) -> tuple[int, ...]:
    """Returns the layers of a model of ``depth`` in the order ``listed`` for one of depth ``of``.

    Those whose nearest layer is not listed are left out.
    """
    nearest = [round(layer * (of - 1) / max(1, depth - 1)) for layer in range(depth)]
    known = [layer for layer in range(depth) if nearest[layer] in listed]
    return tuple(sorted(known, key=lambda layer: listed.index(nearest[layer])))
