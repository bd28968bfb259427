from __future__ import annotations

import pytest

from tests.kernels.compiled import TARGETS, built

STRIDES = dict.fromkeys(("x_outer", "x_inner", "y_outer", "y_inner", "rows", "n", "d"), "i32")


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("dtype", "rows", "block"),
    [("bf16", 1, 2048), ("fp16", 2, 1024), ("fp32", 1, 2048), ("bf16", 32, 64), ("fp32", 2048, 1)],
)
def test_fits(target: str, dtype: str, rows: int, block: int) -> None:
    from vtprune.kernels._triton.row_pair_stats import _stats

    types = {"x": f"*{dtype}", "y": f"*{dtype}", **STRIDES}
    types |= dict.fromkeys(("norm_x", "norm_y", "dot"), "*fp32")
    built(_stats, types, target, ROWS=rows, BLOCK=block)
