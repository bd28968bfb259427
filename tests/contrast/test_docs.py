"""What docs/contrastive.md shows runs, in order, without a network; so does the count."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_code_of_the_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "contrastive.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block, names)
    assert names["scores"].shape == (256,) and bool(torch.isfinite(names["scores"]).all())
    width, height = names["refined"].size
    assert width >= names["sample"].image.width and height >= names["sample"].image.height
    assert names["sample"].expected in capsys.readouterr().out


@pytest.mark.slow
def test_the_benchmark_counts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = ROOT / "benchmarks" / "contrastive.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--scenes", "2"])
    runpy.run_path(str(script), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert [re.split(r"  +", line)[0] for line in lines] == [
        *("plain", "DAMRO", "AGLA", "CARVE, 32 tokens", "fastervlm, 32 tokens")
    ]
    assert all(re.search(r" [012] of 2 right$", line) for line in lines)
