from __future__ import annotations

import pytest

from tests.kernels.compiled import TARGETS, built

# Of each tensor of a stage the words: hidden states, cos and sin, ids, a mask, odd widths.
STAGE = ("*i64", "*i32", "*i32", "*i64", "*i8", "*i16")
COUNTS = ("i32",) * len(STAGE)
TYPES = {"index": "*i64", "index_batch": "i32", "n": "i32", "k": "i32", "words": COUNTS}
TYPES |= {"sources": STAGE, "batches": COUNTS, "steps": COUNTS, "outs": STAGE}


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("rows", "block", "warps"), [(1, 1024, 4), (32, 1, 1), (8, 128, 4)])
@pytest.mark.parametrize("filled", [False, True])
def test_fits(target: str, rows: int, block: int, warps: int, filled: bool) -> None:
    from vtprune.kernels._triton.gather_tokens import _gather

    rest, counts = (STAGE, COUNTS) if filled else ((), ())
    types = {**TYPES, "others": rest, "other_batches": counts, "other_steps": counts}
    built(_gather, types, target, warps=warps, FILLED=filled, ROWS=rows, BLOCK=block)
