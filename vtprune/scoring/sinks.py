"""Tokens that draw attention without content, and attention moved from some keys to others.

B prompts, L tokens, C width of the language model, H heads, Q queries, K keys.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vtprune.needs import Facts

EPS = 1e-6
TAU = 20.0  # by the authors of VAR: what a sink's norm-free activation exceeds
WIDTH = 4096  # of the model that they took it from
# In which hidden dimensions sinks are large, by family, layers and width of the language model. The
# first two are of the authors' code; the others were found by users of it.
DIMS = {
    ("LLaVA-1.5", 32, 4096): (1415, 2533),
    ("LLaVA-1.5", 40, 5120): (2100, 4743),
    ("Qwen2-VL", 28, 3584): (458, 2570),
    ("Qwen2.5-VL", 28, 3584): (458, 2570),
    ("Qwen2.5-VL", 36, 2048): (318, 1874, 1819),
    ("Qwen2.5-VL", 64, 5120): (4675, 3094),
    ("Qwen2-VL", 28, 1536): (1073, 534, 940),
}


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


def known_dims(facts: Facts) -> tuple[int, ...] | None:
    """Returns the dims of ``sink_score`` for a model, None where nobody has published them."""
    for (family, layers, width), dims in DIMS.items():
        named = facts.family == family or facts.family.startswith(f"{family} ")
        if named and (facts.decoder_layers, facts.decoder_width) == (layers, width):
            return dims
    return None


def threshold(width: int) -> float:
    """Returns ``TAU``, in models narrower than the authors' the same share of the most.

    One of ``width`` dimensions exceeds the root mean square of all at most ``sqrt(width)`` times.
    """
    return TAU * min(1.0, (width / WIDTH) ** 0.5)


def find_sinks(
    hidden: Tensor, first: Tensor, dims: Sequence[int] | None, tau: float | None = None
) -> Tensor:
    """Returns which tokens that enter a layer are sinks, ``[B, L]`` bool.

    Args:
        hidden: ``[B, L, C]``; first: ``[B, L]`` bool, the first token of each prompt.
        dims: see ``sink_score``; None = those in which the first token, a sink in most models,
            exceeds ``tau`` itself: without any there is none.
        tau: see ``TAU``; None = ``threshold`` of the width.
    """
    least = threshold(hidden.shape[-1]) if tau is None else tau
    if dims is not None:
        return sink_score(hidden, dims) > least
    x = hidden.float()
    large = x.abs() * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() > least
    massive = (large & first[..., None]).any(1, keepdim=True)
    return (large & massive).any(-1)


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
