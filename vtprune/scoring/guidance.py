"""What a strategy that is guided by the instruction reads, and what it makes of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vtprune.errors import InputError
from vtprune.scoring.text import relevance
from vtprune.types import Facts, InstructionText, Joint, Need, Signals


def guidance_needs(facts: Facts) -> tuple[Need, ...]:
    """Returns the instruction's embeddings, and patches in their space where a text tower is."""
    joint = (Joint(facts.feature_block),) if Joint in facts.signals else ()
    return (*joint, InstructionText())


def guidance(signals: Signals) -> Tensor:
    """Returns how relevant each token is to the instruction, ``[B, N]`` float32, NaN where broken.

    In the space of a text tower a patch is the more relevant the lower its cosine to the text, as
    the authors of TRIM and CDPruner take it; among the language model's embeddings, the higher.

    Raises:
        InputError: the signals hold no text.
    """
    if signals.text is None:
        raise InputError("The signals hold no text; give the instruction's embeddings per row.")
    joint = [value for need, value in signals.values.items() if isinstance(need, Joint)]
    if joint:
        return -relevance(joint[0], signals.text)
    return relevance(signals.tokens, signals.text)


def unit_guidance(signals: Signals) -> Tensor:
    """Returns ``guidance`` stretched to (0, 1] over all tiles of an image, ``[B, N]`` float32."""
    every = [(guidance(group), group.item) for group in signals.groups if group.item is not None]
    return unit_range(guidance(signals), signals.item, every)


def unit_range(
    x: Tensor, item: Tensor | None, every: Sequence[tuple[Tensor, Tensor]] = ()
) -> Tensor:
    """Stretches ``x`` ``[B, N]`` to (0, 1] per image: ``(x - min + 1e-6) / (max - min)``.

    Ones where all are equal; NaN stays and counts for nothing.

    Args:
        item: ``[B]``, the image of each row; None = one row per image.
        every: values and images of all rows that count, where those of ``x`` are not all.
    """
    low, high = _ends(x)
    if item is not None:
        ends = [(*_ends(values), of) for values, of in every or [(x, item)]]
        lows, highs, owner = (torch.cat(each) for each in zip(*ends, strict=True))
        same = item[:, None] == owner
        low = lows.expand_as(same).masked_fill(~same, float("inf")).amin(1)
        high = highs.expand_as(same).masked_fill(~same, float("-inf")).amax(1)
    spread = (high - low)[:, None]
    stretched = (x - low[:, None] + 1e-6) / spread
    return stretched.where(spread > 0, 1.0).masked_fill(x.isnan(), float("nan"))


def _ends(x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the lowest and the highest value of each row, NaN aside."""
    low = x.nan_to_num(nan=float("inf")).amin(1)
    return low, x.nan_to_num(nan=float("-inf")).amax(1)
