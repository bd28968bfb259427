from __future__ import annotations

import pytest

from tests.kernels.compiled import TARGETS, built

TYPES = {"relevance": "*fp32", "cosines": "*fp32", "picks": "*i64", "n": "i32", "k": "i32"}
SWEEP = TYPES | {"value": "*fp32", "first": "*i64", "weight": "fp32"}
DPP = TYPES | {"gain": "*fp32", "left": "*fp32", "factor": "*fp32"}


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("mode", ["max_min", "max_sum", "mmr"])
@pytest.mark.parametrize(("block", "warps"), [(1, 4), (256, 4), (1024, 4), (4096, 8)])
def test_sweep_fits(target: str, mode: str, block: int, warps: int) -> None:
    from vtprune.kernels._triton.greedy_select import _sweep

    built(_sweep, SWEEP, target, warps=warps, MODE=mode, BLOCK=block)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("block", "depth"), [(1, 8), (256, 8), (1024, 8), (2048, 8), (4096, 4)])
def test_dpp_fits(target: str, block: int, depth: int) -> None:
    from vtprune.kernels._triton.greedy_select import _dpp

    built(_dpp, DPP, target, warps=8, BLOCK=block, DEPTH=depth)
