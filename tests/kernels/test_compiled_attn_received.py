from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

from tests.kernels.compiled import TARGETS, built

pytestmark = pytest.mark.slow
COUNTS = "q_b q_h q_m k_b k_h k_n seen_m seen_n heads shared_by m n blocks splits share apart"
TYPES = {**dict.fromkeys(COUNTS.split(), "i32"), "scale": "fp32", "factor": "fp32"}
TYPES |= {"sums": "*fp32", "out": "*fp32", "seen": "*u8", "starts": "*i32"}
NAMES = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}


def both(target: str, dtype: torch.dtype, d: int, few: bool = False, **how: bool) -> list[Any]:
    """Compiles both passes, as they are launched for many queries of that width, or a few."""
    from vtprune.kernels._triton._attention import _key_means, _log_sums
    from vtprune.kernels._triton.attn_received import halves, tile

    held = tile(dtype, 1000, d, few, target.startswith("gfx"))
    flags = {"CAUSAL": False, "PACKED": False, "SEEN": few, "STACK": 7 if few else 1, **how}
    sizes = dict(zip(("D", "D0", "D1"), (d, *halves(d)), strict=True))
    fixed: dict[str, Any] = {
        **flags,
        **sizes,
        "QUERIES": held.queries,
        "KEYS": held.keys,
        "UPCAST": False,
    }
    made = []
    parts: list[tuple[Any, dict[str, Any]]] = [(_log_sums, {}), (_key_means, {"SPLIT": few})]
    for kernel, more in parts:
        types = TYPES | {"q": NAMES[dtype], "k": NAMES[dtype]}
        types = {name: types[name] for name in kernel.arg_names if name in types}
        fixed |= {"warps": held.warps, "stages": held.stages}
        made.append(built(kernel, types, target, **fixed, **more))
    return made


@pytest.mark.parametrize(
    ("target", "d"),
    [*product(TARGETS, (64, 72, 128)), ("sm_80", 96), *(("sm_90", d) for d in (16, 80, 96))],
)
def test_fits(target: str, d: int) -> None:
    made = both(target, torch.bfloat16, d, CAUSAL=True, PACKED=True)
    if target == "sm_90":
        assert all("wgmma.mma_async" in kernel.asm["ptx"] for kernel in made)


@pytest.mark.parametrize("target", TARGETS)
def test_float32_fits(target: str) -> None:
    both(target, torch.float32, 128)


def test_heads_are_read_in_two_parts() -> None:
    from vtprune.kernels._triton.attn_received import halves

    assert [halves(d) for d in (8, 16, 64, 72, 80, 96, 128)] == [
        (16, 0),
        (16, 0),
        (64, 0),
        (64, 16),
        (64, 16),
        (64, 32),
        (128, 0),
    ]
