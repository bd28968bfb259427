"""ATS: one sample of the patches of recorded queries, keys and values, image by image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

import vtprune
from tests.golden_harness import Output, Tensors
from vtprune.engine.reduction import maps, reduced
from vtprune.strategies.ats import ATS
from vtprune.types import ClsRow, Quantity, Signals, ValueNorm


def from_golden(params: dict[str, Any], tensors: Tensors) -> dict[str, Output]:
    images = [_image(params, tensors, row) for row in range(params["B"])]
    widths = {"out.keep": tensors["out.keep"].shape[1], "out.scores": params["N"] - 1}
    return {
        name: torch.stack(
            [_filled(image[name], widths.get(name, params["n_tokens"])) for image in images]
        )
        for name in images[0]
    }


def _image(params: dict[str, Any], tensors: Tensors, row: int) -> dict[str, Tensor]:
    real = tensors["in.policy"][row, :, 0] > 0
    q, k, v = (tensors[f"in.{name}"][row : row + 1, :, real] for name in "qkv")
    x, most = tensors["in.x"][row, real], int(real.sum()) - 1
    needs = (ClsRow(0), ValueNorm(0))
    values: dict[Quantity, Tensor] = {n: reduced(n, q, k, v, 1, None, None) for n in needs}
    signals = Signals(x[None, 1:], values=values, n_prefix=1)
    grid = params["n_ref_tokens"]
    strategy = ATS(grid=grid, compat=grid < params["N"])  # what the recorded quirk is
    rows = vtprune.select(strategy, keep=most, signals=signals).rows
    score = strategy.significance(signals)
    rank = score.gather(1, rows).argsort(dim=1)
    at = torch.cat([torch.zeros(1).long(), rows.gather(1, rank)[0] + 1])
    heard = (maps(q, k, None, None) @ v)[0].transpose(0, 1).flatten(1)  # [1 + n, C]
    index = real.nonzero()[:, 0]
    whole = score.new_zeros(len(real) - 1)
    whole[index[1:] - 1] = score[0] / score.sum()
    return {
        "out.keep": index[at].sort().values,
        "out.order": index[at],
        "out.policy": torch.ones(len(at), 1),
        "out.selected": x[at],
        "out.attn_out": heard[at],
        "out.scores": whole,
    }


def _filled(part: Tensor, length: int) -> Tensor:
    """Fills an image up to as many rows, indices with -1 and others with 0."""
    behind = (0, 0) * (part.ndim - 1) + (0, length - len(part))
    return pad(part, behind, value=0.0 if part.is_floating_point() else -1)
