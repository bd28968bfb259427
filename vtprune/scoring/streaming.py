"""A video as it comes, frame by frame: what is unlike its frame and all that was seen stays."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vtprune.errors import ConfigError, InputError
from vtprune.kernels.topk_sorted import topk_sorted
from vtprune.scoring.temporal import steady_channels, typicality


class StreamingPruner:
    """Chooses from each frame what to keep, with a memory of one vector for all before.

    The rule is STC's (arXiv 2512.00891): as ``vidcom2``, but a token is compared with its frame and
    with the mean of all frames so far, and each frame keeps equally many.
    """

    def __init__(self, keep: int | None = None) -> None:
        """``keep``: tokens that stay per frame, at least 1; None = it is said with each frame.

        Raises:
            ConfigError: it is no such number.
        """
        self.keep = None if keep is None else _checked(keep)
        self._memory: Tensor | None = None
        self._frames = 0

    def update(self, tokens: Tensor, keep: int | None = None) -> Tensor:
        """Returns which tokens of the next frame stay, and remembers the frame.

        Args:
            tokens: ``[N, D]``, after the projector; NaN or inf come last and are not remembered.
            keep: of this frame, in place of the pruner's own; 0 only remembers it.

        Returns:
            ``[k]`` int64, ascending; all of a frame that has no more.

        Raises:
            InputError: no float ``[N, D]``, or another D than before.
            ConfigError: nobody has said how many stay.
        """
        k = self.keep if keep is None else _checked(keep, least=0)
        if k is None:
            raise ConfigError("keep is missing; give it to StreamingPruner() or to update().")
        self._check(tokens)
        x, broken = tokens.float(), ~tokens.isfinite().all(-1)
        x = x.masked_fill(broken[:, None], 0.0)
        self._remember(x.mean(0))
        score = self._scores(x).masked_fill(broken, -torch.inf)
        return topk_sorted(score[None], min(k, len(x)))[0]

    def reset(self) -> None:
        """Forgets all frames: another video begins."""
        self._memory, self._frames = None, 0

    def _remember(self, mean: Tensor) -> None:
        self._frames += 1
        before = mean if self._memory is None else self._memory
        self._memory = before + (mean - before) / self._frames

    def _scores(self, x: Tensor) -> Tensor:
        """Returns ``[N]``, higher = less typical."""
        assert self._memory is not None  # the frame itself is in it
        steady = steady_channels(x[None, None])[0]
        units = F.normalize(x[:, steady], dim=-1)
        seen = F.normalize(self._memory[steady], dim=-1)
        return -typicality(units, units.mean(0, keepdim=True)) - typicality(units, seen[None])

    def _check(self, tokens: Tensor) -> None:
        width = None if self._memory is None else len(self._memory)
        fits = (
            tokens.ndim == 2
            and tokens.is_floating_point()
            and tokens.shape[1] == (width or tokens.shape[1])
        )
        if not fits:
            wanted = f"[N, {width}] as before, or reset()" if width else "[N, D]"
            raise InputError(
                f"A frame is {list(tokens.shape)} {tokens.dtype}; give a float tensor {wanted}."
            )


def _checked(keep: int, least: int = 1) -> int:
    if isinstance(keep, bool) or not isinstance(keep, int) or keep < least:
        raise ConfigError(f"keep={keep!r} must be a count of at least {least}.")
    return keep
