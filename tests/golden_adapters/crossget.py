"""CrossGET: one merge of recorded states, whose last token guides it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

import vtprune
from tests.golden_harness import Output, Tensors
from vtprune.engine.reduction import maps
from vtprune.types import ClsRow, Guidance, Keys, Received, Selection, Signals, WideKeys

GUIDE = slice(1, -1)  # patches stand between [CLS] and the guide


def from_golden(params: dict[str, Any], tensors: Tensors) -> dict[str, Output]:
    x, size = tensors["in.x"], tensors["in.size"]
    values = _clip(tensors) if params["form"] == "clip" else _llava(tensors, size)
    patches = {need: value[:, GUIDE] for need, value in values.items()}
    signals = Signals(x[:, GUIDE], values=patches, n_prefix=2, size=size[:, GUIDE, 0])
    r = min(params["r"], signals.n // 2)
    selection = vtprune.select("crossget", keep=signals.n - r, signals=signals)
    importance = next(reversed(values.values()))
    outputs = _outputs(x, size, selection, importance, tensors)
    if "out.importance" in tensors:
        outputs["out.importance"] = importance
    return outputs


def _clip(tensors: Tensors) -> dict[Any, Tensor]:
    keys, queries = tensors["in.k_full"], tensors["in.q_full"]
    guidance = cosine_similarity(keys, queries[:, -1:], dim=-1)
    return {WideKeys(0): keys, Guidance(0): guidance}


def _llava(tensors: Tensors, size: Tensor) -> dict[Any, Tensor]:
    """The guide's row stands for that of [CLS], and is not among the mean."""
    attention = maps(tensors["in.q"], tensors["in.k"], None, size.log().mT[:, None]).mean(1)
    received, guide = attention[:, :-1].mean(1), attention[:, -1]
    keys = tensors["in.k"].mean(1)
    return {Keys(0): keys, Received(0): received, ClsRow(0): guide, "importance": received + guide}


def _outputs(
    x: Tensor, size: Tensor, selection: Selection, importance: Tensor, tensors: Tensors
) -> dict[str, Any]:
    """What is left, the first and the last token with it."""
    n = x.shape[1]
    first, last = x.new_zeros(len(x), 1).long(), torch.full((len(x), 1), n - 1)
    keep = torch.cat([first, selection.rows + 1, last], dim=1)
    assert selection.mix is not None
    into = torch.zeros_like(selection.mix.target)
    into = into.scatter(1, selection.mix.source, selection.mix.target)
    owner = torch.cat([first, selection.rows.gather(1, into) + 1, last], dim=1)
    made = selection.apply(x[:, GUIDE])
    sizes = selection.total(size[:, GUIDE, 0])[..., None]
    left = torch.arange(n).expand_as(owner) != owner
    src = torch.stack([row.nonzero()[:, 0] for row in left])
    dst = owner.gather(1, src)
    pair = torch.stack([importance.gather(1, src), importance.gather(1, dst)], dim=-1)
    order = tensors["out.src"].argsort(dim=1)
    return {
        "out.keep": keep,
        "out.owner": owner,
        "out.tokens": torch.cat([x[:, :1], made, x[:, -1:]], dim=1),
        "out.size": torch.cat([size[:, :1], sizes, size[:, -1:]], dim=1),
        "out.src": (src, tensors["out.src"].gather(1, order)),
        "out.dst": (dst, tensors["out.dst"].gather(1, order)),
        "out.weight": (
            pair.softmax(-1),
            tensors["out.weight"].gather(1, order[..., None].expand(-1, -1, 2)),
        ),
    }
