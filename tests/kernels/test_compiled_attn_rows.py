from __future__ import annotations

import pytest
import torch

from tests.kernels.compiled import TARGETS
from tests.kernels.test_compiled_attn_received import both

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("d", [80, 128])
def test_fits(target: str, d: int) -> None:
    _, means = both(target, torch.bfloat16, d, few=True)
    if target == "sm_90":  # whose tiles are of 64 rows, and there are so many keys only
        assert "wgmma.mma_async" in means.asm["ptx"]


@pytest.mark.parametrize("target", TARGETS)
def test_float32_fits(target: str) -> None:
    both(target, torch.float32, 128, few=True)
