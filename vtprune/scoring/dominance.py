"""How much attention goes to text and to visual tokens, beside how many there are of each.

L layers, K tokens of the prompt. Definitions of arXiv 2508.10552, which has no official code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Dominance:
    """Per layer ``[L]`` float32; NaN where a kind has no token or nothing is attended to.

    Attributes:
        mdi: attention per text token over that per visual token; above 1 text dominates.
        aei_text: the share of attention that text gets over its share of tokens.
        aei_visual: the same of visual tokens.
        text: the share of attention that text gets.
    """

    mdi: Tensor
    aei_text: Tensor
    aei_visual: Tensor
    text: Tensor


def dominance(attention: Tensor, text: Tensor, visual: Tensor) -> Dominance:
    """Compares attention with numbers of tokens, layer by layer.

    Args:
        attention: ``[L, K]`` that tokens of the prompt get from generated ones, summed over these,
            in any unit.
        text, visual: ``[L, K]`` bool, the tokens of each kind that are there in a layer. A token of
            neither (the first one, which draws attention whatever it is) counts nowhere.
    """
    mass, present = (
        torch.stack([(x * kind).sum(1) for kind in (text, visual)])
        for x in (attention.float(), torch.ones_like(attention, dtype=torch.float32))
    )
    per_token = mass / present
    shares, numbers = mass / mass.sum(0), present / present.sum(0)
    efficiency = shares / numbers
    return Dominance(per_token[0] / per_token[1], efficiency[0], efficiency[1], shares[0])


def stages(values: Tensor) -> Tensor:
    """Returns means over the first two, the middle two and the last two layers, ``[3]``.

    Args:
        values: ``[L]``, L of at least 2.
    """
    middle = len(values) // 2
    spans = values[:2], values[middle - 1 : middle + 1], values[-2:]
    return torch.stack([span.mean() for span in spans])
