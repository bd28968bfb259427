"""Tensors in few bits: each group of neighbouring numbers has its own range, in equal steps."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vtprune.errors import ConfigError, InputError
from vtprune.rules import BITS


@dataclass(frozen=True)
class Packed:
    """A tensor ``[..., d]`` in ``bits`` a number, in G groups of ``group`` numbers along d.

    Attributes:
        codes: ``[..., G, group * bits / 8]`` uint8; the first number is in the lowest bits.
        step: ``[..., G]``, between neighbouring values; ``low`` the least one. Both have the
            tensor's own dtype.
        width: d; the last group is filled up where that is no multiple of ``group``.
    """

    codes: Tensor
    step: Tensor
    low: Tensor
    bits: int
    width: int

    @property
    def nbytes(self) -> int:
        """Bytes that are held."""
        return sum(x.numel() * x.element_size() for x in (self.codes, self.step, self.low))

    def rows(self, index: Tensor) -> Packed:
        """Returns some rows of the first dimension; ``index`` ``[b]`` int64."""
        codes, step, low = (x[index.to(x.device)] for x in (self.codes, self.step, self.low))
        return replace(self, codes=codes, step=step, low=low)

    def unpack(self) -> Tensor:
        """Returns the tensor ``[..., d]``, each number at most half a step off.

        Besides that, what its dtype rounds.
        """
        shifts = _shifts(self.bits, self.codes.device)
        levels = (self.codes[..., None] >> shifts) & (2**self.bits - 1)
        values = levels.flatten(-2) * self.step.float()[..., None] + self.low.float()[..., None]
        return values.flatten(-2)[..., : self.width].to(self.low.dtype)


def pack(x: Tensor, bits: int, group: int = 32) -> Packed:
    """Returns ``x`` ``[..., d]`` in ``bits`` a number.

    Groups lie along the last dimension: that of a head's channels, where each token has its own
    ranges; transposed, each channel has.

    Args:
        bits: 1, 2, 4 or 8.
        group: numbers that share a range, a multiple of 8.

    Raises:
        ConfigError: ``bits`` or ``group`` out of range.
        InputError: no float tensor, or without a number along its last dimension.
    """
    _check(x, bits, group)
    width = x.shape[-1]
    filled = torch.arange(-(-width // group) * group, device=x.device).clamp(max=width - 1)
    values = x.float()[..., filled].unflatten(-1, (-1, group))
    least, most = values.aminmax(dim=-1)
    low, step = least.to(x.dtype), ((most - least) / (2**bits - 1)).to(x.dtype)
    # By what is stored, so that its own rounding is made up for.
    known = step.float()[..., None]
    levels = (values - low.float()[..., None]) / torch.where(known > 0, known, 1.0)
    levels = levels.round().clamp(0, 2**bits - 1).to(torch.uint8)
    parts = levels.unflatten(-1, (-1, 8 // bits)) << _shifts(bits, x.device)
    return Packed(parts.sum(-1, dtype=torch.uint8), step, low, bits, width)


def _shifts(bits: int, device: torch.device) -> Tensor:
    return torch.arange(0, 8, bits, dtype=torch.uint8, device=device)


def _check(x: Tensor, bits: int, group: int) -> None:
    if bits not in BITS:
        raise ConfigError(f"bits={bits!r} do not fill a byte; give one of {BITS}.")
    if group < 8 or group % 8:
        raise ConfigError(f"group={group!r} fills no whole bytes; give a multiple of 8.")
    if not x.is_floating_point() or not x.ndim or not x.shape[-1]:
        raise InputError(f"pack: x is {list(x.shape)} {x.dtype}; give floats [..., d] with d > 0.")
