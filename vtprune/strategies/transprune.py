"""TransPrune: drop in stages the tokens that layers of the language model change least.

A token's transition is how much attention and MLP stretch and turn it, summed over the layers since
the one before the first stage; the attention of the instruction is added to it. Later layers run
shorter; with ``instruction=False`` no attention is read at all. arXiv 2507.20630
(liaolea/TransPrune). As in the official code turning is 1 - cos (the paper: 1 - |cos|, which is
``abs_cos``), the attention is that of the layer that a stage acts before, and positions are
renumbered. The official code normalises over all samples of a batch, here each is taken alone.
Defaults: official scripts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vtprune.errors import ConfigError
from vtprune.strategies._staged import Staged
from vtprune.types import Quantity, Signals, TextRows, Transition


@dataclass(frozen=True)
class TransPrune(Staged):
    """``layers``, by default 7, 9 and 12 of 32, and ``ratios`` as in ``Staged``.

    ``keep=0.41`` leaves the ratios as they are. For the authors' lower budget ``keep=0.314`` with
    ``ratios=(0.65, 0.25, 0.05)`` has their FLOPs; theirs are not public. ``alpha`` weighs
    transition against ``instruction``, which can be left out; ``abs_cos`` takes the cosine's
    absolute value.
    """

    before: ClassVar[tuple[int, ...]] = (7, 9, 12)

    ratios: tuple[float, ...] = (0.875, 0.625, 0.125)
    alpha: float = 0.5
    instruction: bool = True
    abs_cos: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise ConfigError(f"alpha={self.alpha} must be from 0 to 1.")

    def read(self, at: int, first: int) -> tuple[Quantity, ...]:
        moved = tuple(Transition(layer, self.abs_cos) for layer in range(first - 1, at))
        return (*moved, TextRows(at)) if self.instruction else moved

    def score(self, signals: Signals) -> Tensor:
        moved = _share(signals.stack(Transition).sum(0))  # [B, N]
        if not self.instruction:
            return moved
        return self.alpha * moved + (1 - self.alpha) * _share(signals.stack(TextRows)[-1])


def _share(x: Tensor) -> Tensor:
    x = x.float().nan_to_num(0.0, 0.0, 0.0)
    return x / (x.sum(1, keepdim=True) + 1e-8)
