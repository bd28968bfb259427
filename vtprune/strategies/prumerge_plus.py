"""PruMerge+: PruMerge with patches at even distances beside those that [CLS] attends to.

About three on a grid for each salient one bring back what attention overlooks. arXiv 2403.15388
(42Shawn/LLaVA-PruMerge). Signals and merging are those of ``prumerge``; the patches of the grid
come after the salient ones, in raster order. With a budget a quarter of it goes by attention and
the grid spans the patches that are left. The stride of the official code, whose grid never reaches
the last patch, comes with ``adaptive``; where it rounds to 0, which ends that code, it is 1.
Defaults: official code, but for adaptive.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vtprune.kernels.topk_sorted import ranked
from vtprune.scoring.diversity import outside
from vtprune.scoring.merging import gridded
from vtprune.strategies.prumerge import PruMerge


@dataclass(frozen=True)
class PruMergePlus(PruMerge):
    """``neighbours``, ``adaptive`` and ``compat`` as in ``PruMerge``.

    With ``adaptive`` the share of outliers gives the stride of the grid too.
    """

    def kept(self, salience: Tensor, k: int) -> Tensor:
        n = salience.shape[1]
        n_grid = k - (k + 3) // 4
        top = ranked(salience)[:, : k - n_grid]
        rest = outside(top, n)
        spaced = torch.arange(n_grid, device=rest.device) * rest.shape[1] // max(1, n_grid)
        kept = torch.cat([top, rest[:, spaced]], dim=1)
        if not self.adaptive:
            return kept
        order, found = self._official(salience)
        own = torch.tensor(found, device=rest.device) == k  # others are cut by the budget
        return torch.where(own[:, None], order[:, :k], kept)

    def found(self, salience: Tensor) -> list[int]:
        return self._official(salience)[1]

    def _official(self, salience: Tensor) -> tuple[Tensor, list[int]]:
        """Returns the order in which patches are kept ``[B, N]``, and how many of each row are."""
        n = salience.shape[1]
        shares = [max(share, 1 / n) for share in self.shares(salience)]
        tops = [max(1, int(n * share)) for share in shares]
        return gridded(salience, tops, [max(1, int(int(1 / share) / 3)) for share in shares])
