from __future__ import annotations

import pytest

from tests.kernels.compiled import TARGETS, built

TYPES = {"scores": "*fp32", "index": "*i64", "inverse": "*i64", "counts": "*i32"}
TYPES |= {"stride": "i32", "n": "i32", "k": "i32"}


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("block", "warps"), [(1024, 4), (4096, 8)])
def test_fits(target: str, block: int, warps: int) -> None:
    from vtprune.kernels._triton.topk_sorted import _topk

    built(_topk, TYPES, target, warps=warps, RAGGED=True, MAPPED=True, BLOCK=block)
