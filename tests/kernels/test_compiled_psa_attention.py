from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

from tests.kernels.compiled import TARGETS, built

pytestmark = pytest.mark.slow
COUNTS = "q_b q_h q_n heads shared_by n blocks whole"
TYPES = {**dict.fromkeys(COUNTS.split(), "i32"), "scale": "fp32"}
TYPES |= {"order": "*i32", "ends": "*i32"}
NAMES = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}


def compiled(target: str, dtype: torch.dtype, d: int, block: int = 128) -> Any:
    from vtprune.kernels._triton.psa_attention import _attend, constants

    fixed = constants(dtype, block, d, target.startswith("gfx"))
    how = {name: fixed.pop(f"num_{name}") for name in ("warps", "stages")}
    types = TYPES | dict.fromkeys(("q", "k", "v", "out"), NAMES[dtype])
    # All but the queries are made right before, so that they start where memory does.
    made = ("k", "v", "out", "order", "ends")
    return built(_attend, types, target, aligned=made, UPCAST=False, **how, **fixed)


@pytest.mark.parametrize(
    ("target", "d"), [*product(TARGETS, (64, 80, 128)), ("sm_80", 96), ("sm_90", 72)]
)
def test_fits(target: str, d: int) -> None:
    made = compiled(target, torch.bfloat16, d)
    if target == "sm_90":
        assert "wgmma.mma_async" in made.asm["ptx"]


@pytest.mark.parametrize("target", TARGETS)
def test_float32_fits(target: str) -> None:
    compiled(target, torch.float32, 128)


@pytest.mark.parametrize("block", [16, 40, 64])
def test_smaller_blocks_fit(block: int) -> None:
    compiled("sm_90", torch.bfloat16, 64, block)
