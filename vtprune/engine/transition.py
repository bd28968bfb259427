"""How much a layer of the language model changes each token, read while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vtprune.engine.cuts import Cut
from vtprune.engine.decoding import Decoding
from vtprune.engine.timing import timed
from vtprune.errors import UnsupportedError
from vtprune.kernels.row_pair_stats import cosine, row_pair_stats
from vtprune.types import Transition


@timed("score")
@torch.no_grad()
def transition(x: Tensor, y: Tensor, valid: Tensor, *, abs_cos: bool = False) -> Tensor:
    """Returns how many times larger each token got, times its share of all turning.

    The share is the softmax of 1 less the cosine between ``x`` and ``y``, over the valid tokens of
    a row.

    Args:
        x, y: ``[B, N, D]`` what goes into a module and what comes out, any float dtype.
        valid: ``[B, N]`` bool; the others give 0.
        abs_cos: take the cosine's absolute value.

    Returns:
        ``[B, N]`` float32.
    """
    before, after, dot = (stat.float() for stat in row_pair_stats(x, y))
    alike = cosine(before, after, dot)
    turning = 1 - (alike.abs() if abs_cos else alike)
    share = turning.masked_fill(~valid, -torch.inf).softmax(-1)
    growth = after / before.clamp(min=torch.finfo(torch.float32).tiny)
    return (growth * share).masked_fill(~valid, 0.0)


def watch(
    layer: nn.Module, need: Transition, current: Callable[[], Decoding | None]
) -> Iterator[Any]:
    """Registers what reads ``need`` of a layer, from what its two halves get and give; the hooks.

    Args:
        current: returns the running call's ``Decoding``, or None to leave a call alone.

    Raises:
        UnsupportedError: the layer has no attention or no MLP of these names.
    """

    def read(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        decoding = current()
        if decoding is None or decoding.prefilled:
            return
        x = args[0] if args else kwargs["hidden_states"]
        y = output[0] if isinstance(output, tuple) else output
        columns = decoding.cut(need.layer) or Cut.whole(decoding.valid)
        found = transition(x, y, columns.valid, abs_cos=need.abs_cos)
        spread = columns.spread(found, decoding.valid.shape[1])
        decoding.rows[need] = decoding.rows.get(need, 0.0) + spread

    for name in ("self_attn", "mlp"):
        part = getattr(layer, name, None)
        if part is None:
            raise UnsupportedError(
                f"{type(layer).__name__} has no {name}, whose input and output {need} compares. "
                "Use a strategy that reads no transition, such as 'pyramiddrop'."
            )
        yield part.register_forward_hook(read, with_kwargs=True)
