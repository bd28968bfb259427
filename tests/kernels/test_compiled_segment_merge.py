from __future__ import annotations

from typing import Any

import pytest

from tests.kernels.compiled import TARGETS, built

SIZES = dict.fromkeys(("x_batch", "x_step", "n", "d", "n_out", "n_edges"), "i32")
TYPES = {"source": "*i64", "weight": "*fp32", "offsets": "*i64", "partial": "*fp32", **SIZES}
MADE = {"bf16": (16, 1), "fp16": (64, 1), "fp32": (256, 4)}  # features of a program, and warps


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", MADE)
def test_outputs_fit(target: str, dtype: str) -> None:
    from vtprune.kernels._triton.segment_merge import CHUNK, EDGES, _merge

    block, warps = MADE[dtype]
    types = {**TYPES, "x": f"*{dtype}", "out": f"*{dtype}"}
    fixed: dict[str, Any] = {"CHUNK": CHUNK, "EDGES": EDGES, "BLOCK": block}
    built(_merge, types, target, warps=warps, LONG=dtype != "fp16", **fixed)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_chunks_fit(target: str, dtype: str) -> None:
    from vtprune.kernels._triton.segment_merge import CHUNK, EDGES, _chunks

    types = {**TYPES, "x": f"*{dtype}", "target": "*i64"}
    built(_chunks, types, target, warps=4, CHUNK=CHUNK, EDGES=EDGES, BLOCK=256)
