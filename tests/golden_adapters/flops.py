"""FLOPs: rows of schedules, of FastV's share saved, and of ToDRE's prefill and decode."""

from __future__ import annotations

from typing import Any

from tests.golden_harness import Row
from vtprune.flops import Shape, schedule

# Width, FFN width, layers of what a row may name besides the model of its case.
MODELS = {"vicuna-7b": (4096, 11008, 32), "vicuna-13b": (5120, 13824, 40)}


def from_golden(params: dict[str, Any], row: Row) -> dict[str, int | float]:
    if "schedule" in row:
        return _schedule(params, row)
    shape = _shape(params, row, gated=False)
    if "K" in row:
        return _saved(shape, row)
    return _phases(shape, row)


def _shape(params: dict[str, Any], row: Row, *, gated: bool) -> Shape:
    own = (params["hidden"], params["ffn"], params["layers"])
    name = row["model"] if "model" in row else params["name"]
    return Shape(*(own if name == params["name"] else MODELS[name]), gated=gated)


def _schedule(params: dict[str, Any], row: Row) -> dict[str, int | float]:
    entering = schedule(*map(tuple, row["schedule"]))
    macs = _shape(params, row, gated=True).prefill(entering)
    answers = {"macs": macs, "tera": round(macs / 1e12, 4)}
    if row.get("published_tera") is not None:  # two decimals
        answers["published_tera"] = round(macs / 1e12, 2)
    return answers


def _saved(shape: Shape, row: Row) -> dict[str, int | float]:
    n, first = row["n"], row["K"]
    left = (1 - row["R"]) * n
    pruned = shape.prefill(schedule((first, n), (shape.layers - first, left)))
    return {"n_hat": left, "ratio": 1 - pruned / shape.prefill([n] * shape.layers)}


def _phases(shape: Shape, row: Row) -> dict[str, int | float]:
    entering = [row["n"]] * shape.layers
    decode = shape.decode(entering, row["L"])
    return {
        "prefill": shape.prefill(entering),
        "decode": decode,
        "decode_closed_form": decode,
    }
