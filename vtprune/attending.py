"""What a rule does in place of the attention of a ViT's block.

A strategy gives the rule of a block as ``Stage.attend``. It is shown queries, keys and values, and
returns what they make. What it leaves with tokens follows those that stay, and what it leaves with
images all of them, to the rules of later blocks.

B images, H heads, S tokens with the prefix ([CLS], registers), d width of a head, C of the states.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from vtprune.kernels._common import full_precision, widened


@dataclass(frozen=True)
class Attending:
    """What a rule is shown.

    Attributes:
        layer: 0-based block; n_prefix: tokens before the first patch.
        q, k, v: ``[B, H, S, d]``, after a rotary embedding.
        x: ``[B, S, C]``, of which they are made: the states after the block's first norm.
        bias: ``[B, 1, 1, S]``, what is added to the products with each key: the logarithm of how
            many patches it stands for, minus infinity where nobody sees it. None = nothing.
        tokens: by name what rules of earlier blocks left with each token, ``[B, S, ...]``.
        rows: by name what they left with each image, ``[B, ...]``.
    """

    layer: int
    n_prefix: int
    q: Tensor
    k: Tensor
    v: Tensor
    x: Tensor
    bias: Tensor | None = None
    tokens: Mapping[str, Tensor] = field(default_factory=dict)
    rows: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def real(self) -> Tensor | None:
        """Which keys are no padding, ``[B, S]`` bool; None = all."""
        return None if self.bias is None else self.bias[:, 0, 0] > -torch.inf

    def logits(self) -> Tensor:
        """Returns the products of queries and keys with the bias, ``[B, H, S, S]`` float32."""
        q, k = widened(self.q), widened(self.k)
        with full_precision(q):
            logits = q @ k.mT * q.shape[-1] ** -0.5
        return logits if self.bias is None else logits + self.bias.to(logits.dtype)


@dataclass(frozen=True)
class Attended:
    """What a rule returns.

    Attributes:
        out: ``[B, H, S, d]`` in the dtype of the values.
        tokens, rows: by name what is left for the rules of later blocks, in place of what was left
            under these names.
        map: ``[B, H, S, S]`` float32, how each query attended to each key, by which stages choose;
            None = as queries and keys say.
        share: what part of the products of queries, keys and values a kernel would compute that
            leaves out those that do not count; what the rule adds included, so that it may be
            above 1.
    """

    out: Tensor
    tokens: Mapping[str, Tensor] = field(default_factory=dict)
    rows: Mapping[str, Tensor] = field(default_factory=dict)
    map: Tensor | None = None
    share: float = 1.0


class AttentionRule(Protocol):
    """The attention of a block.

    A rule couples no images, draws no random numbers, and reads no number from the device.

    Attributes:
        pooled: the name of what it leaves with tokens, ``[B, S]``, by which a mean over them after
            the last block is to multiply each; None = nothing.
    """

    pooled: ClassVar[str | None] = None

    def attend(self, given: Attending) -> Attended:
        """Returns what the block's tokens attend to; differentiable in all that is given."""
        ...


def gathered(map: Tensor, v: Tensor) -> Tensor:
    """Returns the values that a map ``[B, H, M, S]`` brings together, in their dtype."""
    with full_precision(v):
        return (map @ widened(v)).to(v.dtype)
