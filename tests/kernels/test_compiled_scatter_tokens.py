from __future__ import annotations

import pytest

from tests.kernels.compiled import TARGETS, built


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_the_inverse_fits(target: str) -> None:
    from vtprune.kernels._triton.scatter_tokens import _invert

    types = {"index": "*i32", "inverse": "*i64", "index_batch": "i32", "n": "i32", "k": "i32"}
    built(_invert, types, target, BLOCK=1024)
