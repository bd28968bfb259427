"""Relevance of visual tokens to the words of an instruction."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize


def relevance(tokens: Tensor, text: Sequence[Tensor]) -> Tensor:
    """Returns the cosine of each token to the texts of its row, mean over the texts.

    Args:
        tokens: ``[B, N, D]``; text: per row ``[M, D]``, M of their own. Zero vectors are similar
            to nothing; a row without text gives zeros.

    Returns:
        ``[B, N]`` float32.
    """
    units = normalize(tokens.float(), dim=-1)
    means = [normalize(t.float(), dim=-1).sum(0) / max(1, len(t)) for t in text]
    return torch.stack([(u * m.to(u)).sum(-1) for u, m in zip(units, means, strict=True)])
