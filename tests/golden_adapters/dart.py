"""DART: pivots and picks from recorded keys and hidden states of the layers around the stage."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import vtprune
from tests.golden_harness import Output, Tensors
from vtprune.engine.rows import KeyNorms
from vtprune.registry import build
from vtprune.scoring.pivots import largest, set_order
from vtprune.types import Inside, KeyNorm, Normed, Quantity, Signals


def from_golden(params: dict[str, Any], tensors: Tensors) -> dict[str, Output]:
    first, n = params["image_start"], params["image_tokens"]
    layer = params["prune_before_layer_0based"]
    options = {"visual": params["pivot_image"], "text": params["pivot_text"], "layers": (layer,)}
    official = build("dart", **options, compat=True)
    hidden = tensors["in.hidden"]
    norm = _norms(tensors["in.k"])
    values: dict[Quantity, Tensor] = {
        KeyNorm(layer - 1): norm,
        Normed(layer): _rms_norm(hidden, tensors["in.norm_weight"], params["rms_norm_eps"]),
    }
    after = tuple({need: x[b, first + n :] for need, x in values.items()} for b in range(len(norm)))
    signals = Signals(
        hidden[:, first : first + n],
        values={need: x[:, first : first + n] for need, x in values.items()},
        inside=Inside(0, (layer,), layer + 1, (n,) * len(norm), (first,) * len(norm), after),
    )
    budget = _budget(params)
    keep = first + vtprune.select(official, keep=budget, signals=signals).rows
    visual = first + largest(norm[0, first : first + n], options["visual"])
    text = first + n + largest(norm[0, first + n :], options["text"])
    pivots = torch.cat([visual, text])
    ours: dict[str, Output] = {
        "out.keep": keep,
        "out.keep_sequence": _sequence(keep, first, n, params["sequence"]),
        "out.pivots": pivots.sort().values[None],
        "out.pivot_order": pivots[set_order(pivots)][None],
    }
    if "out.keep_ascending_pivots" in tensors:
        exact = build("dart", **options)
        chosen = vtprune.select(exact, keep=params["kept_image_tokens"], signals=signals)
        ours["out.keep_ascending_pivots"] = first + chosen.rows
    return ours


def _budget(params: dict[str, Any]) -> int:
    """The budget as the authors state it, before they share it among the pivots."""
    given = params["retain_token_num_for_llava_next"] or params["max_num_trunction"]
    return int(given or params["image_tokens"] * (1 - params["reduction_ratio"]))


def _norms(keys: Tensor) -> Tensor:
    """What the engine reads of keys ``[B, H, S, d]``: ``[B, S]``."""
    reader = KeyNorms(torch.nn.Identity(), torch.ones(0), torch.ones(0))
    with reader.only():
        reader.read(reader.module, keys, keys, None, None)
    return reader.value()


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


def _sequence(keep: Tensor, first: int, n: int, length: int) -> Tensor:
    """All places that stay, text included, ``[1, S]``."""
    columns = torch.arange(length)
    text = columns[(columns < first) | (columns >= first + n)]
    return torch.cat([text, keep[0]]).sort().values[None]
