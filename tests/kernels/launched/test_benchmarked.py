"""The kernels do what the benchmark of operations is to time."""

from __future__ import annotations

import pytest
import torch

from vtprune import kernels
from vtprune.eval.bench_kernels import arguments, cases, check_ran, in_float64, limit
from vtprune.eval.bench_ops import OPS


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", OPS)
def test_quick_sizes(name: str, dtype: str, device: str) -> None:
    op = OPS[name]
    for case in cases([name], [dtype], quick=True):
        args = arguments(case, torch.device(device))
        want = in_float64(op, args)
        kernels.reset_stats()
        got = op.ours(*args)
        check_ran(name, "triton")
        assert op.error(got, want) <= limit(case, "triton", got)
