"""The tests of launched kernels, each file in a process that interprets them on the CPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCHED = Path(__file__).parent / "launched"
ROOT = LAUNCHED.parents[2]
ONCE = "test_row_pair_stats.py"  # in the default suite, where there is no time for all


@pytest.mark.parametrize(
    "file",
    [
        pytest.param(path.name, marks=[] if path.name == ONCE else pytest.mark.slow)
        for path in sorted(LAUNCHED.glob("test_*.py"))
    ],
)
def test_kernels_do_what_torch_does(file: str) -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-m", "", "-rs"]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", str(LAUNCHED / file)],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert re.search(r"[1-9]\d* passed", done.stdout) and "skipped" not in done.stdout
