"""The examples run as a reader would run them, without a network; so does code in the docs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vtprune
import vtprune.strategies
from vtprune.types import Signals

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def run(script: Path, cwd: Path, *args: str) -> str:
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    result = subprocess.run(
        [sys.executable, str(script), *args],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": paths},
        cwd=cwd,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_llava_example_answers_with_a_quarter_of_the_tokens(tmp_path: Path) -> None:
    out = run(ROOT / "examples" / "llava.py", tmp_path)
    assert re.search(r"^all tokens: \w+$", out, re.MULTILINE)
    assert re.search(r"^a quarter: \w+$", out, re.MULTILINE)
    assert "64 of 256 visual tokens, 25.0 %" in out


def test_compare_strategies_counts_and_says_what_was_lost(tmp_path: Path) -> None:
    few = ["--strategies", "random", "fastervlm", "--keep", "4", "--scenes", "14"]
    out = run(ROOT / "examples" / "compare_strategies.py", tmp_path, *few)
    right = [int(n) for n in re.findall(r"^\S+:? .*?(\d+) of 14$", out, re.MULTILINE)]
    lost = out.count(" -> ")
    assert len(right) == 3
    assert "random, 4 of 256 tokens" in out
    assert 2 * right[0] - right[1] - right[2] <= lost  # gained answers make up the rest


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < 60


def test_prefill_benchmark_prints_every_call(tmp_path: Path) -> None:
    small = ["--rounds", "1", "--blocks", "2", "--layers", "1", "--width", "64", "--keep", "16"]
    script = ROOT / "benchmarks" / "prefill.py"
    out = run(script, tmp_path, *small, "--strategies", "fastervlm", "visionzip")
    rows = re.findall(r"^\| (\w+) \| \d+ \| \d+ - \d+ \| ([\d.]+) \| ([\d.]+) \|$", out, re.M)
    assert [row[0] for row in rows] == ["unpruned", "free", "fastervlm", "visionzip"]
    assert rows[0][1] == rows[1][2] == "1.000"
    assert "576 visual tokens" in out


def test_documented_strategy_works_as_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (ROOT / "docs" / "adding_a_strategy.md").read_text(encoding="utf-8")
    code = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)[0]
    (tmp_path / "largest_norm.py").write_text(code, encoding="utf-8")
    path = [*vtprune.strategies.__path__, str(tmp_path)]
    monkeypatch.setattr(vtprune.strategies, "__path__", path)
    tokens = torch.tensor([[[1.0, 1.0], [3.0, 0.0], [2.0, 2.0]]])
    try:
        for order, kept in ((1.0, 2), (100.0, 1)):
            chosen = vtprune.select("largest_norm", keep=1, order=order, signals=Signals(tokens))
            assert chosen.rows.tolist() == [[kept]]
        with pytest.raises(vtprune.ConfigError, match="above 0"):
            vtprune.select("largest_norm", keep=1, order=0.0, signals=Signals(tokens))
    finally:
        sys.modules.pop("vtprune.strategies.largest_norm", None)
