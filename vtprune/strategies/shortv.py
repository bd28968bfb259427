"""ShortV: freeze visual tokens in the layers that do least to them.

In many layers of the language model visual tokens hardly change what is answered. There they stay
as they are: no queries, no attention, no MLP; their keys and values are made as ever, and text sees
them. arXiv 2504.00502 (icip-cas/ShortV), without training. Which layers those are was measured by
the authors for LLaVA-1.5 with 32 and 40 layers; ``vtprune calibrate`` measures it for any model,
and ``layers=`` takes the result. Models of another depth take the place of the nearest layer, first
on first and last on last. Defaults: official code.
"""

from __future__ import annotations

from dataclasses import dataclass

from vtprune.errors import ConfigError
from vtprune.strategies._compute import Compute
from vtprune.types import Facts, RowRule

# Layers of LLaVA-1.5-7B and -13B in the order of their replacement; the others were never replaced.
ORDER_7B = (31, 29, 30, 28, 0, 26, 27, 25, 24, 22, 23, 21, 2, 3, 20, 18, 17, 12, 19)
ORDER_13B = (
    *(39, 32, 28, 36, 27, 37, 29, 30, 1, 38, 25, 31),
    *(2, 26, 23, 34, 0, 33, 35, 22, 24, 21, 20, 17),
)


@dataclass(frozen=True)
class ShortV(Compute):
    """``replaced`` layers, a number or a share of all, in the authors' order; or ``layers``."""

    replaced: int | float = 0.6

    def __post_init__(self) -> None:
        whole = isinstance(self.replaced, int) and not isinstance(self.replaced, bool)
        if not (whole and self.replaced >= 1) and not (
            isinstance(self.replaced, float) and 0 < self.replaced <= 1
        ):
            raise ConfigError(
                f"replaced={self.replaced!r} is neither a number of layers from 1 on nor a share "
                "above 0.0 and up to 1.0."
            )

    def default_layers(self, facts: Facts) -> tuple[int, ...]:
        depth, ranked = facts.decoder_layers, order(facts.decoder_layers)
        authors = authors_order(depth)
        if isinstance(self.replaced, int):
            n, too_many = self.replaced, self.replaced > len(ranked)
        else:
            n = min(round(self.replaced * depth), len(ranked))
            too_many = round(self.replaced * authors[1]) > len(authors[0])
        if too_many and self.layers is None:
            raise ConfigError(
                f"replaced={self.replaced}: of these {depth} layers the authors order only "
                f"{len(ranked)}. Give at most those, or layers= from 'vtprune calibrate shortv'."
            )
        return tuple(sorted(ranked[: max(1, n)]))

    def rule(self, layer: int, facts: Facts) -> RowRule:
        return RowRule(attend="none", mlp=0.0)


def authors_order(depth: int) -> tuple[tuple[int, ...], int]:
    """Returns the authors' order for the model nearest to this ``depth``, and its own depth."""
    return (ORDER_13B, 40) if depth == 40 else (ORDER_7B, 32)


def order(depth: int) -> tuple[int, ...]:
    """Returns the layers of a language model of ``depth`` in the order of their replacement."""
    ranked, authors = authors_order(depth)
    nearest = [round(layer * (authors - 1) / max(1, depth - 1)) for layer in range(depth)]
    known = [layer for layer in range(depth) if nearest[layer] in ranked]
    return tuple(sorted(known, key=lambda layer: ranked.index(nearest[layer])))
