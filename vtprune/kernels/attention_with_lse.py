"""The log-sum-exp that attention computes on its way, where torch lets it be seen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

T = TypeVar("T")
# What torch's attention calls; names that a release lacks are never met.
FUSED = tuple(
    f"aten::_scaled_dot_product_{how}_attention{where}"
    for how, where in (("flash", ""), ("flash", "_for_cpu"), ("efficient", ""))
)


def attention_with_lse(attend: Callable[[], T], q: Tensor, k: Tensor) -> tuple[T, Tensor | None]:
    """Returns what ``attend`` returns, and the log-sum-exp of its attention.

    It is called as it is, so that its outputs are the same bits. Nothing is computed twice.

    Args:
        attend: calls ``scaled_dot_product_attention`` once, without a mask.
        q: ``[B, H, M, d]``, its queries; k: ``[B, Hkv, N, d]``, its keys.

    Returns:
        The second ``[B, H, M]`` float32, by the natural logarithm; None where attention ran in a
        form that does not say it, or masked, or in a graph of ``torch.compile``.
    """
    if torch.compiler.is_compiling():
        return attend(), None
    with _Watching() as watching:
        out = attend()
    if len(watching.seen) != 1:
        return out, None
    given, lse = watching.seen[0]
    masks = (given.get(name) for name in ("attn_mask", "attn_bias"))
    same = given["query"].shape[:3] == q.shape[:3] and given["key"].shape[2] == k.shape[2]
    if not same or given.get("is_causal") or any(x is not None for x in masks):
        return out, None
    if lse.shape[:2] != q.shape[:2] or lse.shape[2] < q.shape[2]:
        return out, None  # not asked for
    return out, lse[:, :, : q.shape[2]]  # some pad it


class _Watching(TorchDispatchMode):
    """Remembers arguments and log-sum-exp of fused attention."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[dict[str, Any], Tensor]] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._schema.name in FUSED:
            names = (argument.name for argument in func._schema.arguments)
            self.seen.append((dict(zip(names, args, strict=False)) | dict(kwargs or {}), out[1]))
        return out
