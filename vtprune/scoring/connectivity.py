"""Which keys a query will attend to, guessed from a few directions: the predictor of Sparsifiner.

arXiv 2303.13755 (lim142857/Sparsifiner). Queries and keys are reduced in width, keys also to few
landmarks, each a weighted sum over the tokens; how a query shares itself out among the landmarks,
times what each landmark stands for, approximates its row of the attention map.

B images, H heads, S tokens with the p of the prefix, d width of a head, M landmarks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vtprune.kernels._common import full_precision

BASES = 8  # landmarks that a query uses
FAINT = 0.02  # parts of a landmark up to this count as none


class Connectivity(nn.Module):
    """The predictor of one block, of ``tokens`` tokens and heads of width ``d``."""

    def __init__(self, tokens: int, d: int, landmarks: int) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(d, d // 2), nn.Linear(d, d // 2)
        self.down = nn.Parameter(torch.empty(tokens, landmarks))
        self.up = nn.Parameter(torch.empty(tokens, landmarks))

    def coefficients(self, q: Tensor, k: Tensor, places: Tensor | None = None) -> Tensor:
        """Returns how each query shares itself out among landmarks, ``[B, H, S, M]`` float32.

        Only its largest ``BASES`` parts are left; of equal ones the first.

        Args:
            q, k: ``[B, H, S, d]``.
            places: ``[B, S]`` int64, which of the predictor's tokens each is; None = all.
        """
        down = (self.down if places is None else self.down[places][:, None]).float()
        with full_precision(q):
            narrow_q, narrow_k = self._narrow(self.q, q), self._narrow(self.k, k)
            landmarks = narrow_k.mT @ down  # [B, H, d / 2, M]
            parts = ((narrow_q @ landmarks) * q.shape[1] ** -0.5).softmax(-1)
        return highest(parts, BASES, zero=0.0)

    def approximate(
        self, q: Tensor, k: Tensor, places: Tensor | None = None, faint: float = FAINT
    ) -> Tensor:
        """Returns about how each query attends to each key, ``[B, H, S, S]`` float32.

        Arguments as of ``coefficients``; parts of a landmark up to ``faint`` are left out.
        """
        basis = self.up.float().abs()
        basis = basis.masked_fill(basis <= faint, 0.0)
        basis = basis if places is None else basis[places][:, None]
        with full_precision(q):
            return self.coefficients(q, k, places) @ basis.mT

    @staticmethod
    def _narrow(reduce: nn.Linear, x: Tensor) -> Tensor:
        return nn.functional.linear(x.float(), reduce.weight.float(), reduce.bias.float())


def highest(x: Tensor, k: int, zero: float) -> Tensor:
    """Returns ``x`` with all but the ``k`` highest of its last dimension at ``zero``."""
    return x.masked_fill(~among_highest(x, k), zero)


def among_highest(x: Tensor, k: int) -> Tensor:
    """Returns which are among the ``k`` highest of the last dimension; of equal ones the first.

    NaN counts as the lowest.
    """
    order = x.detach().nan_to_num(nan=-torch.inf).sort(dim=-1, descending=True, stable=True).indices
    return torch.zeros_like(x, dtype=torch.bool).scatter(-1, order[..., :k], True)


def connections(approximate: Tensor, n_prefix: int, budget: int, real: Tensor | None) -> Tensor:
    """Returns which keys each query sees, ``[B, H, S, S]`` bool; those of the prefix see all.

    Args:
        approximate: ``[B, H, S, S]``, about how each query attends.
        budget: keys that a query sees.
        real: ``[B, S]`` bool, which keys are no padding; None = all.
    """
    if real is not None:
        approximate = approximate.masked_fill(~real[:, None, None], -torch.inf)
    seen = among_highest(approximate, min(budget, approximate.shape[-1]))
    prefix = torch.arange(seen.shape[2], device=seen.device) < n_prefix
    seen = seen | prefix[:, None]
    return seen if real is None else seen & real[:, None, None]


def n_seen(rate: float, tokens: int) -> int:
    """Returns how many of ``tokens`` keys a query sees at a rate."""
    return math.ceil(rate * tokens)
