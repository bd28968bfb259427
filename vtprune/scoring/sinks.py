"""Tokens that draw attention without content, and attention moved from some keys to others.

B prompts, L tokens, C width of the language model, H heads, Q queries, K keys.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

EPS = 1e-6
TAU = 20.0  # by the authors of VAR: what a sink's norm-free activation exceeds


def sink_score(hidden: Tensor, dims: Sequence[int]) -> Tensor:
    """Returns the largest of a token's activations in ``dims``, over their root mean square.

    A sink is what exceeds ``TAU``. arXiv 2503.03321 (seilk/VisAttnSink).

    Args:
        hidden: ``[B, L, C]``, what enters a layer; dims: those in which sinks of the model are
            large, 0-based.

    Returns:
        ``[B, L]`` float32.
    """
    x = hidden.float()
    scale = (x.square().mean(-1, keepdim=True) + EPS).rsqrt()
    return (x * scale)[..., list(dims)].abs().amax(-1)


def image_centric(
    attention: Tensor, visual: Tensor, sinks: Tensor, *, least: float = 0.2, share: float = 0.5
) -> Tensor:
    """Marks heads that look at an image, and there not mostly at sinks, ``[B, H, Q]`` bool.

    Args:
        attention: ``[B, H, Q, K]`` after softmax; visual, sinks: ``[B, K]`` bool.
        least: of a head's attention that goes to visual tokens; share: of that, which goes to
            visual tokens that are no sinks.
    """
    seen = (attention * visual[:, None, None]).sum(-1)
    wasted = (attention * (visual & sinks)[:, None, None]).sum(-1)
    return (seen >= least) & (wasted <= (1 - share) * seen)


def rescale_attention(
    attention: Tensor, source: Tensor, factor: float | Tensor, into: Tensor | None = None
) -> Tensor:
    """Multiplies the attention to some keys, and hands what they lose to others; rows still sum.

    Args:
        attention: ``[..., Q, K]`` after softmax; source: bool, broadcast against it, the keys that
            are multiplied; factor: of at least 0, or such a tensor.
        into: bool, likewise, the keys that get what is lost, in proportion; None = all keys, the
            multiplied ones too. A row in which these get no attention stays as it is.

    Returns:
        ``[..., Q, K]`` in the dtype of ``attention``.
    """
    x = attention.float()
    scaled = torch.where(source, x * factor, x)
    lost = (x - scaled).sum(-1, keepdim=True)
    taking = scaled if into is None else scaled * into
    total = taking.sum(-1, keepdim=True)
    moved = scaled + lost * taking / total.clamp(min=torch.finfo(x.dtype).tiny)
    return torch.where(total > 0, moved, x).to(attention.dtype)
