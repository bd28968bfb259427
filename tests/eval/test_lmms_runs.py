"""lmms-eval's own command line, and sweeps of its tasks, as whole runs on the shipped model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from datasets import config
from lmms_eval.api import task as lmms_task

from vtprune import ConfigError
from vtprune.eval import shipped
from vtprune.eval.budgets import points
from vtprune.eval.lmms_benchmarks import find_benchmarks
from vtprune.eval.lmms_plugin import TASKS
from vtprune.eval.results import Folder
from vtprune.eval.samples import answer_of
from vtprune.eval.sweep import Sweep, settings_of
from vtprune.eval.sweep_lmms import LmmsSweep

pytestmark = pytest.mark.slow
TASK = "vtprune_scenes"
LAUNCHER = ("torch.distributed.run", "--nproc_per_node", "2", "-m")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Where data sets are made; of this process and of those that it starts."""
    path = str(tmp_path_factory.mktemp("datasets"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "HF_DATASETS_CACHE", path)
        patch.setenv("HF_DATASETS_CACHE", path)
        lmms_task._resolve_hf_datasets_cache_dir.cache_clear()
        yield path
    lmms_task._resolve_hf_datasets_cache_dir.cache_clear()


@pytest.fixture
def run(cache, tmp_path):
    """Runs a module of Python in an empty folder, without the network and without a GPU."""

    def start(*args):
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
        env |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        words = [sys.executable, "-m", *map(str, args)]
        done = subprocess.run(words, capture_output=True, text=True, env=env, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout + done.stderr

    return start


def lmms_args(said, limit, size, out):
    return (
        *("lmms_eval", "--model", "vtprune", "--model_args", said),
        *("--include_path", TASKS, "--tasks", TASK, "--limit", limit, "--batch_size", size),
        *("--output_path", out, "--log_samples"),
    )


def written(folder: Path):
    (file,) = folder.rglob("*_results.json")
    (rows,) = folder.rglob(f"*_samples_{TASK}.jsonl")
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    return json.loads(file.read_text()), {line["doc_id"]: line for line in lines}


def test_both_routes_agree_sample_by_sample(cache, tmp_path):
    model, processor = shipped.load()
    chosen = points(["random", "hiprune", "fastv"], ["25%"])
    options: dict[str, Any] = {"limit": 24, "batch_size": 8, "seed": 3}
    ours = settings_of(model, processor, "m", task="scenes", **options)
    direct = Sweep(model, processor, chosen, ours)
    theirs = settings_of(model, processor, "m", task=f"lmms:{TASK}", **options)
    found = find_benchmarks([f"lmms:{TASK}"])
    through = LmmsSweep(model, processor, chosen, theirs, benchmarks=found)
    rows = []
    for number, (sweep, settings) in enumerate([(direct, ours), (through, theirs)]):
        folder = Folder(tmp_path / str(number), settings)
        sweep.run(folder)
        folder.close()
        rows.append({(row.point, row.sample): row for row in folder.answers.rows})
    assert rows[0].keys() == rows[1].keys()
    assert len(rows[0]) == 24 * len(chosen)
    for key, a in rows[0].items():
        b = rows[1][key]
        assert (a.kind, a.question, a.expected) == (b.kind, b.question, b.expected)
        assert a.answer == answer_of(b.answer)
        assert (a.right, a.tokens, a.kept) == (b.right, b.tokens, b.kept), key
    assert {row.right for row in rows[0].values()} == {True, False}


def test_ranks_of_lmms_eval_answer_as_one_process(run, tmp_path):
    said = "pretrained=mini-llava,strategy='hiprune(alpha=0.2)',keep=0.25"
    run(*lmms_args(said, 5, 2, tmp_path / "one"))
    run(*LAUNCHER, *lmms_args(said, 5, 2, tmp_path / "two"))
    one, samples = written(tmp_path / "one")
    two, shared = written(tmp_path / "two")
    assert one["results"][TASK]["scenes_accuracy,none"] == pytest.approx(
        two["results"][TASK]["scenes_accuracy,none"]
    )
    assert samples.keys() == shared.keys() == set(range(5))
    for number, sample in samples.items():
        assert sample["filtered_resps"] == shared[number]["filtered_resps"]
        assert sample["token_counts"] == shared[number]["token_counts"]
        assert 64 < sample["token_counts"][0]["input_tokens"] < 100
    assert one["efficiency"]["overall"]["docs_with_token_counts"] == 5
    assert one["throughput"]["avg_kept_tokens"] == two["throughput"]["avg_kept_tokens"] == 64
    assert one["throughput"]["avg_visual_tokens"] == 256
    times = [one["throughput"][f"avg_{name}_ms"] for name in ("score", "prefill", "first_token")]
    assert 0 < times[0] < times[2]
    assert 0 < times[1] < times[2]


def test_lmms_eval_says_what_is_wrong_with_the_arguments(run, tmp_path):
    said = run(*lmms_args("pretrained=mini-llava,strategy=hiprun,keep=64", 1, 1, tmp_path / "o"))
    assert "Did you mean 'hiprune'" in said


def test_ranks_of_a_sweep_write_what_one_process_does(run, tmp_path):
    sweep = (
        *("vtprune.eval", "sweep", "--task", f"lmms:{TASK}", "--strategy", "random,hiprune"),
        *("--keep", "25%", "--limit", 6, "--batch-size", 2, "--out"),
    )
    run(*sweep, "one")
    run(*LAUNCHER, *sweep, "two")
    for name in ("results.jsonl", "metrics.jsonl", "metrics.md"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert len((tmp_path / "one" / "metrics.jsonl").read_text().splitlines()) == 4
    assert not list((tmp_path / "two").glob("*rank-*.jsonl"))


def test_a_name_that_lmms_eval_does_not_know_is_refused(cache):
    with pytest.raises(ConfigError, match=r"no task 'pope_adve'. Did you mean .*pope_adv"):
        find_benchmarks([f"lmms:{TASK}", "lmms:pope_adve"])
