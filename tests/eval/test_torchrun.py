"""Sweeps as torchrun starts them: whole, interrupted, killed, refused."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
EVAL = ["-m", "vtprune.eval"]
pytestmark = pytest.mark.slow


def start(words: list[str], cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        words, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    )


def environment() -> dict[str, str]:
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return {**os.environ, "PYTHONPATH": paths}


def run(words: list[str], cwd: Path) -> str:
    process = start(words, cwd)
    out, errors = process.communicate()
    assert process.returncode == 0, errors
    return out


def test_ranks_write_what_one_process_writes_even_interrupted(model_dir, tmp_path):
    few = ["--strategy", "random,visionzip", "--keep", "25%,3", "--limit", "30"]
    sweep = ["sweep", "--model", str(model_dir), *few, "--batch-size", "2", "--out"]
    run([sys.executable, *EVAL, *sweep, "one"], tmp_path)
    process = start([*TORCHRUN, *EVAL, *sweep, "two"], tmp_path)
    of_second = tmp_path / "two" / "timings.rank-1.jsonl"
    while process.poll() is None and not of_second.exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate()
    assert "SignalException" in errors  # torchrun's own
    assert out.count("Files: two") == 1  # of one rank, after its table
    rows = len((tmp_path / "two" / "results.jsonl").read_text().splitlines())
    assert 0 < rows < 180
    assert f"Interrupted; {rows} of 180 answers are in two. This resumes:" in out
    (line,) = [line for line in out.splitlines() if line.startswith("torchrun ")]
    assert line.startswith("torchrun --nproc_per_node 2 -m vtprune.eval sweep ")
    resumed = run([*TORCHRUN[:-2], *shlex.split(line)[1:]], tmp_path)
    assert "180/180" in resumed
    one, two = (tmp_path / name for name in ("one", "two"))
    assert (one / "results.jsonl").read_bytes() == (two / "results.jsonl").read_bytes()
    left = {path.name for path in two.iterdir()} - {path.name for path in one.iterdir()}
    assert left == {".lock.rank-1"}


def test_vits_are_shared_too(tmp_path):
    few = ["--strategy", "random,tome", "--keep", "50%", "--limit", "12", "--batch-size", "5"]
    sweep = ["sweep", "--model", "mini-clip", *few, "--out"]
    run([sys.executable, *EVAL, *sweep, "one"], tmp_path)
    run([*TORCHRUN, *EVAL, *sweep, "two"], tmp_path)
    one, two = ((tmp_path / name / "results.jsonl").read_bytes() for name in ("one", "two"))
    assert one == two
    assert one.count(b"\n") == 12 * 4 * 3  # both ways, at 1 and 5


def test_an_error_of_all_is_told_once(tmp_path):
    process = start([*TORCHRUN, *EVAL, "sweep", "--strategy", "nope"], tmp_path)
    _, errors = process.communicate()
    assert process.returncode != 0
    assert errors.count("Unknown strategy 'nope'") == 1
    assert not list(tmp_path.iterdir())


def test_killed_at_random_moments():
    script = ROOT / "benchmarks" / "kill_sweeps.py"
    out = run([sys.executable, str(script), "--rounds", "4", "--limit", "12"], ROOT)
    assert out.endswith("\n4 of 4 byte-identical\n")
