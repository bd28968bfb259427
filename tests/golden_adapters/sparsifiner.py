"""Sparsifiner: the attention of one block, by predictors of recorded weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.golden_harness import Output, Tensors
from vtprune.attending import Attending
from vtprune.scoring.connectivity import Connectivity, connections, n_seen
from vtprune.strategies.sparsifiner import Sparse, Sparsifiner
from vtprune.types import Budget, ClsRow, Inside, Signals


def from_golden(params: dict[str, Any], tensors: Tensors) -> dict[str, Output]:
    q, k, v = (tensors[f"in.{name}"] for name in "qkv")
    predictor = _predictor(params, tensors)
    rule = Sparse(0, nn.ModuleList([predictor]), params["attn_keep_rate"])
    made = rule.attend(Attending(0, 1, q, k, v, v))
    assert made.map is not None
    assert n_seen(rule.seen, params["N"]) == params["attn_budget"]
    guess = predictor.approximate(q, k)
    out: dict[str, Output] = {
        "out.approx": guess[:, :, 1:],
        "out.mask": connections(guess, 1, params["attn_budget"], None).to(torch.uint8),
        "out.out": made.out.transpose(1, 2).flatten(2),
    }
    if params["token_keep_rate"] is not None:
        row = made.map[:, :, 0, 1:].mean(1)
        inside = Inside(0, (3,), 12, (row.shape[1],))
        signals = Signals(torch.zeros(*row.shape, 1), values={ClsRow(0): row}, inside=inside)
        strategy = Sparsifiner(rate=params["token_keep_rate"])
        n = strategy.counts(signals, Budget(fraction=1.0))[0]
        out["out.keep"] = strategy.select(signals, n).rows + 1
    return out


def _predictor(params: dict[str, Any], tensors: Tensors) -> Connectivity:
    made = Connectivity(params["N"], params["head_dim"], params["n_prime"])
    state = {
        "q.weight": tensors["in.wq"],
        "q.bias": tensors["in.bq"],
        "k.weight": tensors["in.wk"],
        "k.bias": tensors["in.bk"],
        "down": tensors["in.p_down"],
        "up": tensors["in.p_up"],
    }
    made.load_state_dict(state)
    return made.requires_grad_(False)
