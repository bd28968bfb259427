"""What a strategy that is guided by the instruction reads, and what it makes of it."""

from __future__ import annotations

from torch import Tensor

from vtprune.errors import InputError
from vtprune.scoring.text import relevance
from vtprune.types import Facts, InstructionText, Joint, Need, Signals


def guidance_needs(facts: Facts, *, tower: bool) -> tuple[Need, ...]:
    """Returns the instruction's embeddings, or with ``tower`` those of a text tower and patches."""
    return (Joint(facts.feature_block), InstructionText()) if tower else (InstructionText(),)


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


def unit_range(x: Tensor, item: Tensor | None) -> Tensor:
    """Stretches ``x`` ``[B, N]`` to (0, 1] per image: ``(x - min + 1e-6) / (max - min)``.

    Ones where all are equal; NaN stays and counts for nothing.

    Args:
        item: ``[B]``, the image of each row; None = one row per image.
    """
    low = x.nan_to_num(nan=float("inf")).amin(1)
    high = x.nan_to_num(nan=float("-inf")).amax(1)
    if item is not None:
        same = item[:, None] == item
        low = low.expand_as(same).masked_fill(~same, float("inf")).amin(1)
        high = high.expand_as(same).masked_fill(~same, float("-inf")).amax(1)
    spread = (high - low)[:, None]
    stretched = (x - low[:, None] + 1e-6) / spread
    return stretched.where(spread > 0, 1.0).masked_fill(x.isnan(), float("nan"))
