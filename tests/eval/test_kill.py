"""Sweeps killed at random moments and resumed end with the bytes of an uninterrupted one."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

FILES = ("results.jsonl", "timings.jsonl")


def start(model_dir: Path, out: Path) -> subprocess.Popen:
    few = ["--strategy", "random,visionzip", "--keep", "25%,3", "--limit", "20"]
    command = ["sweep", "--model", str(model_dir), *few, "--batch-size", "4", "--out", str(out)]
    return subprocess.Popen(
        [sys.executable, "-m", "vtprune", *command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        cwd=out.parent,
    )


def finish(process: subprocess.Popen) -> None:
    _, errors = process.communicate()
    assert process.returncode == 0, errors.decode()


def kill_and_resume(model_dir: Path, out: Path, size: float) -> int:
    """Kills with SIGKILL when so many bytes have been written; returns the bytes left."""
    process = start(model_dir, out)
    results = out / "results.jsonl"
    while process.poll() is None and not (results.exists() and results.stat().st_size > size):
        time.sleep(0.001)
    process.kill()
    process.communicate()
    left = results.stat().st_size
    finish(start(model_dir, out))
    return left


@pytest.mark.slow
def test_killed_and_resumed(model_dir, tmp_path):
    finish(start(model_dir, tmp_path / "whole"))
    whole = {name: (tmp_path / "whole" / name).read_bytes() for name in FILES}
    marks = [json.loads(line) for line in whole["timings.jsonl"].splitlines()]
    draw, most = random.Random(0), len(whole["results.jsonl"])
    sizes = []
    for i in range(8):
        out = tmp_path / f"killed-{i}"
        sizes.append(kill_and_resume(model_dir, out, draw.random() * most))
        assert (out / "results.jsonl").read_bytes() == whole["results.jsonl"]
        found = [json.loads(line) for line in (out / "timings.jsonl").read_text().splitlines()]
        batches = [tuple(mark.values())[:-1] for mark in found]  # all but the time
        assert sorted(batches) == sorted(tuple(mark.values())[:-1] for mark in marks)
    interrupted = [size for size in sizes if size < most]
    print(f"bytes at the kill, of {most}: {sizes}")
    assert len(interrupted) >= 4  # else the kills came too late to prove anything
