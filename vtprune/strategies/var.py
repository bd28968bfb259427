"""VAR: hand the attention that sinks draw to the rest of the image, in heads that look at it.

A few visual tokens draw attention and say nothing of the image; as other sinks they are large in a
few hidden dimensions. In heads that look at an image, and not mostly at its sinks, part of what
all sinks get goes to the visual tokens that are none, in proportion. arXiv 2503.03321
(seilk/VisAttnSink). Nothing is saved: rows of the text after the image, and of decoded tokens, are
computed again. As in the paper the last layer is left alone and ``moved_fraction`` is 0.6;
``compat`` does as the official code, where it is 0.4 and the last layer takes part. In models
narrower than the authors' 7B sinks are told by a lower threshold, the same share of the most that
a dimension can reach. Images may be many and anywhere. Defaults: the paper; which heads take part,
as in the official code.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vtprune.interventions import Entering, Keys
from vtprune.scoring.sinks import image_centric, rescale_attention
from vtprune.strategies._compute import Compute
from vtprune.strategies._sinks import Dims, check_share, check_sinks, dims_for, marked
from vtprune.types import Budget, Facts, Intervention


@dataclass(frozen=True)
class VAR(Compute):
    """``layers`` are by default all from 2 on but the last, with ``compat`` the last one too.

    ``dims``: hidden dimensions, 0-based, in which sinks are large; None = those published for the
    model, else ``auto``: those in which a prompt's first token is. A sink exceeds ``tau`` there,
    over the root mean square of all; None = 20, or less as said above. ``moved_fraction``: of the
    attention of sinks; None = 0.6. A head takes part whose attention to an image is at ``least``
    so much, a share ``rho`` of it to tokens that are no sinks. ``compat``: as the official code.
    """

    dims: Dims = None
    tau: float | None = None
    rho: float = 0.5
    least: float = 0.2
    moved_fraction: float | None = None
    compat: bool = False

    def __post_init__(self) -> None:
        check_sinks(self)
        check_share("rho", self.rho)
        check_share("least", self.least)
        if self.moved_fraction is not None:
            check_share("moved_fraction", self.moved_fraction)

    def default_layers(self, facts: Facts) -> tuple[int, ...]:
        every = range(facts.decoder_layers)
        later = every[2:] if self.compat else every[2:-1]
        return tuple(later or every)

    def check_budget(self, budget: Budget, facts: Facts) -> None:
        dims_for(self.dims, facts)

    def rule(self, layer: int, facts: Facts) -> Intervention:
        return Intervention(replace(self, dims=dims_for(self.dims, facts)))

    def mark(self, entering: Entering) -> tuple[Tensor, ...]:
        return (marked(entering, self.dims, self.tau),)

    def edit(self, rows: Tensor, keys: Keys) -> Tensor:
        """Returns attention in which sinks of the image lose some; without any all is as it was."""
        (sinks,) = keys.marks
        given = 0.4 if self.compat else 0.6
        moved = given if self.moved_fraction is None else self.moved_fraction
        visual = keys.visual[:, 0, 0], sinks[:, 0, 0]
        centric = image_centric(rows, *visual, least=self.least, share=self.rho)
        some = (keys.visual & sinks).any(-1, keepdim=True)
        others = keys.visual & ~sinks
        return torch.where(
            centric[..., None] & some, rescale_attention(rows, sinks, 1 - moved, others), rows
        )
