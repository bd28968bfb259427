"""The operations that are measured: sizes, arguments, what they have to read and compute."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vtprune.eval import bench_eager
from vtprune.kernels.attn_received import attn_received
from vtprune.kernels.attn_rows import attn_rows
from vtprune.kernels.gather_tokens import gather_tokens
from vtprune.kernels.greedy_select import greedy_select
from vtprune.kernels.psa_attention import psa_attention
from vtprune.kernels.row_pair_stats import row_pair_stats
from vtprune.kernels.scatter_tokens import scatter_tokens
from vtprune.kernels.segment_merge import segment_merge
from vtprune.kernels.topk_sorted import topk_sorted

Shape = dict[str, Any]
TAKES = {"max_sum": "pivot", "mmr": "relevance", "dpp": "relevance"}  # modes of greedy_select
Normal = Callable[..., Tensor]  # sizes -> seeded normal numbers, float32, where they are used


def tensors_of(out: Any) -> tuple[Tensor, ...]:
    """Returns what an operation returned as a tuple."""
    return (out,) if isinstance(out, Tensor) else tuple(out)


def deviation(got: Any, want: Any) -> float:
    """Returns the largest deviation by the largest magnitude, infinite where a NaN is."""
    worst = 0.0
    for ours, right in zip(tensors_of(got), tensors_of(want), strict=True):
        if ours.shape != right.shape or not bool(ours.isfinite().all()):
            return float("inf")
        ours, right = ours.double(), right.double()
        worst = max(worst, float((ours - right).abs().max() / right.abs().max().clamp(min=1e-30)))
    return worst


def missed(got: Tensor, want: Tensor) -> float:
    """Returns the share of picks ``[B, K]`` that are not among those wanted."""
    if got.shape != want.shape:
        return float("inf")
    return 1.0 - float((got[:, :, None] == want[:, None]).any(-1).double().mean())


def read_and_written(args: Sequence[Any], out: Any) -> int:
    """Returns the bytes of all arguments and of what is returned."""
    return sum(x.nbytes for x in (*args, *tensors_of(out)) if isinstance(x, Tensor))


@dataclass(frozen=True)
class Op:
    """An operation.

    Attributes:
        ours, by_hand: the public function, and what one would write instead, of equal arguments.
        make: returns the arguments of a shape in a dtype.
        shapes, quick: sizes by name; small ones for CPUs.
        flops: of the matrix products that a shape cannot do without, additions counted too.
        n_bytes: of arguments and result, what has to be read and written at least.
        error: how far a result is from the right one; limit: how far it may be, None = as far as
            rounding in its dtypes explains.
        dtype, products: the only dtype that it takes, or multiplies in; None = that of its input.
        unrolled: a compiler would unroll its loop over picks, which takes minutes.
    """

    ours: Callable[..., Any]
    by_hand: Callable[..., Any]
    make: Callable[[Normal, torch.dtype, Shape], tuple[Any, ...]]
    shapes: Sequence[Shape]
    quick: Sequence[Shape]
    flops: Callable[[Shape], float] = lambda shape: 0
    n_bytes: Callable[[Sequence[Any], Any], int] = read_and_written
    error: Callable[[Any, Any], float] = deviation
    limit: float | None = None
    dtype: str | None = None
    products: str | None = None
    unrolled: bool = False


def _sizes(names: str, *rows: tuple[Any, ...]) -> tuple[Shape, ...]:
    return tuple(dict(zip(names.split(), row, strict=True)) for row in rows)


def _attention(normal: Normal, dtype: torch.dtype, shape: Shape) -> tuple[Any, ...]:
    b, n, h, d = (shape[name] for name in ("B", "N", "H", "d"))
    q, k = normal(b, h, shape.get("M", n), d), normal(b, shape.get("Hkv", h), n, d)
    return q.to(dtype), k.to(dtype)


def _levels(shape: Shape) -> Tensor:
    """Levels ``[n, n]`` as a long prompt has them: half the blocks are not seen."""
    place = torch.arange(-(-shape["N"] // shape["block"]))
    levels = torch.tensor(_LEVELS)[(3 * place[:, None] + 5 * place) % len(_LEVELS)]
    return levels.masked_fill((place == place[:, None]) | (place == 0), 1).tril()


def _pyramid(normal: Normal, dtype: torch.dtype, shape: Shape) -> tuple[Any, ...]:
    q, k = _attention(normal, dtype, shape)
    levels = _levels(shape).to(q.device).expand(*q.shape[:2], -1, -1)
    return q, k, normal(*k.shape).to(dtype), levels, shape["block"]


def _pyramid_flops(shape: Shape) -> float:
    levels = _levels(shape).double()
    pairs = torch.where(levels > 0, 1 / levels, 0.0).sum() - len(levels) / 2  # half of the diagonal
    return 4 * shape["B"] * shape["H"] * shape["d"] * shape["block"] ** 2 * float(pairs)


def _features(normal: Normal, dtype: torch.dtype, shape: Shape) -> tuple[Any, ...]:
    b, n, mode = shape["B"], shape["N"], shape["mode"]
    given = None
    if mode in TAKES:
        given = normal(b, n).argmax(1) if mode == "max_sum" else normal(b, n).sigmoid()
    return normal(b, n, shape["D"]).to(dtype), shape["K"], mode, given


def _select(features: Tensor, k: int, mode: Any, given: Tensor | None) -> Tensor:
    named: dict[str, Any] = {TAKES[mode]: given} if mode in TAKES else {}
    return greedy_select(features, k, mode, **named)


def _select_flops(shape: Shape) -> float:
    pairs = shape["N"] / 2 if shape["mode"] == "max_min" else shape["K"]
    return 2 * shape["B"] * pairs * shape["N"] * shape["D"]


def _edges(normal: Normal, dtype: torch.dtype, shape: Shape) -> tuple[Any, ...]:
    """The first N - r tokens stay, and each of the other r goes into one of them."""
    b, n, r = shape["B"], shape["N"], shape["r"]
    weight = normal(b, n).sigmoid()
    source = torch.arange(n, device=weight.device).repeat(b, 1)
    target = torch.cat([source[:, : n - r], (normal(b, r).sigmoid() * (n - r)).long()], dim=1)
    return normal(b, n, shape["D"]).to(dtype), source, target, weight, n - r


def _scores(normal: Normal, dtype: torch.dtype, shape: Shape) -> tuple[Any, ...]:
    return normal(shape["B"], shape["N"]).to(dtype), shape["K"]


def _pairs(normal: Normal, dtype: torch.dtype, shape: Shape) -> tuple[Any, ...]:
    x, y = (normal(shape["B"], shape["N"], shape["D"]) for _ in range(2))
    return x.to(dtype), (x + y).to(dtype)


def _stage(normal: Normal, dtype: torch.dtype, shape: Shape) -> tuple[Any, ...]:
    """Hidden states, cosines and sines of a rotary embedding, and ids of positions."""
    b, n = shape["B"], shape["N"]
    index = normal(b, n).argsort(1)[:, : shape["K"]].sort(1).values
    hidden, cos, sin = (normal(b, n, shape[name]).to(dtype) for name in ("D", "d", "d"))
    return index, hidden, cos, sin, torch.arange(n, device=index.device).repeat(b, 1)


def _places(normal: Normal, dtype: torch.dtype, shape: Shape) -> tuple[Any, ...]:
    index, hidden, *_ = _stage(normal, dtype, {**shape, "d": 1})
    return index, normal(shape["B"], shape["K"], shape["D"]).to(dtype), hidden


def _scatter(index: Tensor, rows: Tensor, into: Tensor) -> tuple[Tensor, ...]:
    return scatter_tokens(index, (rows, into))


_RECEIVED = [(1, 577, 16, 64), (64, 577, 16, 64), (8, 2880, 16, 64), (1, 4096, 16, 80)]
_RECEIVED += [(1, 16384, 16, 80), (4, 16384, 16, 80), (8, 4096, 32, 128)]
_LEVELS = (0, 4, 0, 1, 0, 8, 0, 2, 0, 4, 0, 1, 0, 8, 2, 0)
_SEEN = [(1, 4096, 16, 16, 64, 128), (1, 4096, 28, 4, 128, 128), (1, 16384, 28, 4, 128, 128)]
_ROWS = [(64, 577, 1, 16, 16, 64), (1, 640, 1, 32, 32, 128), (1, 16640, 1, 28, 4, 128)]
_PICKS = [(1, 576, 1024, 64, "max_min"), (16, 576, 1024, 64, "max_min")]
_PICKS += [(1, 2880, 1024, 320, mode) for mode in ("max_min", "max_sum", "mmr")]
_PICKS += [(1, 576, 1024, 192, "dpp")]
OPS = {
    "attn_received": Op(
        attn_received,
        bench_eager.attention,
        _attention,
        _sizes("B N H d", *_RECEIVED),
        _sizes("B N H d", (1, 257, 4, 64)),
        # Once: who keeps no matrix needs a second time, unless the softmax's sums are given.
        flops=lambda s: 2 * s["B"] * s["H"] * s["N"] ** 2 * s["d"],
    ),
    "attn_rows": Op(
        attn_rows,
        bench_eager.attention,
        _attention,
        _sizes("B N M H Hkv d", *_ROWS, (1, 16640, 64, 28, 4, 128)),
        _sizes("B N M H Hkv d", (2, 257, 4, 8, 2, 64)),
        flops=lambda s: 2 * s["B"] * s["H"] * s["M"] * s["N"] * s["d"],
    ),
    "psa_attention": Op(
        psa_attention,
        bench_eager.pyramid,
        _pyramid,
        _sizes("B N H Hkv d block", *_SEEN),
        _sizes("B N H Hkv d block", (2, 200, 4, 2, 64, 32)),
        flops=_pyramid_flops,
    ),
    "greedy_select": Op(
        _select,
        bench_eager.greedy,
        _features,
        _sizes("B N D K mode", *_PICKS),
        _sizes("B N D K mode", *((2, 96, 64, 12, mode) for mode in ("max_min", *TAKES))),
        flops=_select_flops,
        error=missed,
        limit=0.02,  # what rounding decides otherwise
        products="float32",
        unrolled=True,
    ),
    "segment_merge": Op(
        segment_merge,
        bench_eager.merge,
        _edges,
        _sizes("B N r D", (64, 577, 144, 1024), (1, 2880, 2240, 4096), (1, 16384, 12288, 3584)),
        _sizes("B N r D", (2, 197, 60, 64)),
    ),
    "topk_sorted": Op(
        topk_sorted,
        bench_eager.topk,
        _scores,
        _sizes("B N K", (1, 576, 64), (64, 577, 192), (1, 2880, 640), (1, 16384, 4096)),
        _sizes("B N K", (4, 577, 64)),
        limit=0.0,
        dtype="float32",  # as all scores are
    ),
    "row_pair_stats": Op(
        row_pair_stats,
        bench_eager.pairs,
        _pairs,
        _sizes("B N D", (1, 2880, 4096), (16, 576, 4096)),
        _sizes("B N D", (2, 128, 256)),
    ),
    "gather_tokens": Op(
        gather_tokens,
        bench_eager.gather,
        _stage,
        _sizes("B N K D d", (1, 2880, 640, 4096, 128), (64, 577, 192, 1024, 128)),
        _sizes("B N K D d", (2, 256, 64, 128, 16)),
        n_bytes=lambda args, out: args[0].nbytes + 2 * sum(x.nbytes for x in out),
        limit=0.0,
    ),
    "scatter_tokens": Op(
        _scatter,
        bench_eager.scatter,
        _places,
        _sizes("B N K D", (1, 2880, 640, 4096), (64, 577, 192, 1024)),
        _sizes("B N K D", (2, 256, 64, 128)),
        n_bytes=lambda args, out: args[0].nbytes + 2 * out[0].nbytes,
        limit=0.0,
    ),
}
