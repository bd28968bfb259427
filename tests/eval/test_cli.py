from __future__ import annotations

import json
import subprocess
import sys

import pytest
from PIL import Image
from typer.testing import CliRunner

from vtprune.eval import scenes
from vtprune.eval.cli import app
from vtprune.eval.sweep import Sweep

WITHOUT_TYPER = """
import sys
sys.modules["typer"] = None
from vtprune.__main__ import main
main()
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the command line in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *args: CliRunner().invoke(app, [str(arg) for arg in args])


def sweep_args(model_dir, *more):
    few = ("--strategy", "strided,fastervlm", "--keep", "100%,25%,4")
    return ("sweep", "--model", model_dir, *few, "--limit", 4, "--out", "out", *more)


def test_sweep_writes_table_plot_and_rows(run, model_dir, tmp_path):
    result = run(*sweep_args(model_dir))
    assert result.exit_code == 0, result.output
    for word in ("unpruned", "blind", "strided", "fastervlm", "25%", "256", "100 % point"):
        assert word in result.output
    out = tmp_path / "out"
    with Image.open(out / "accuracy.png") as picture:
        assert picture.size[0] >= 1000
    summary = json.loads((out / "summary.json").read_text())
    names = [(row["strategy"], row["budget"]) for row in summary]
    assert names == [
        ("unpruned", "100%"),
        ("blind", "0%"),
        ("strided", "25%"),
        ("strided", "4"),
        ("fastervlm", "25%"),
        ("fastervlm", "4"),
    ]
    assert all(row["n"] == 4 for row in summary)
    table = (out / "table.md").read_text()
    assert all(f"| {name} | {budget} |" in table for name, budget in names)
    assert len((out / "results.jsonl").read_text().splitlines()) == 4 * len(names)


def test_sweep_resumes_and_refuses_other_settings(run, model_dir, tmp_path):
    assert run(*sweep_args(model_dir)).exit_code == 0
    results = tmp_path / "out" / "results.jsonl"
    whole = results.read_bytes()
    results.write_bytes(whole[:-200])
    refused = run(*sweep_args(model_dir, "--seed", 3))
    assert refused.exit_code == 2
    assert "seed: 0 there, 3 now" in refused.output
    assert len(refused.output.strip().splitlines()) == 1
    assert run(*sweep_args(model_dir)).exit_code == 0
    assert results.read_bytes() == whole


def test_ctrl_c_says_what_is_done(run, model_dir, monkeypatch, tmp_path):
    measure = Sweep.measure

    def interrupted(self, point, batch):
        if point.strategy == "fastervlm":
            raise KeyboardInterrupt
        return measure(self, point, batch)

    monkeypatch.setattr(Sweep, "measure", interrupted)
    result = run(*sweep_args(model_dir))
    assert result.exit_code == 130
    assert "16 of 24 answers are in out. The same command resumes." in result.output
    assert len((tmp_path / "out" / "results.jsonl").read_text().splitlines()) == 16


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("sweep", "--strategy", "fastvlm"), "Did you mean 'fastervlm'"),
        (("sweep", "--keep", "lots"), "Budget 'lots'"),
        (("sweep", "--model", "mini-lava"), "Did you mean 'mini-llava'"),
        (("sweep", "--out", __file__), "is a file"),
        (("show", "absent.png"), "no image file absent.png"),
        (("show", "absent.png", "--strategy", "nope"), "Unknown strategy 'nope'"),
        (("show", "absent.png", "--keep", "0"), "Budget '0'"),
    ],
)
def test_errors_are_one_line(run, tmp_path, args, said):
    result = run(*args)
    assert result.exit_code == 2
    assert said in result.output
    assert len(result.output.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_too_large_a_budget_is_refused_before_the_first_forward(run, model_dir, tmp_path):
    result = run(*sweep_args(model_dir, "--keep", "300"))
    assert result.exit_code == 2
    assert "keep=300, but an image has 256 tokens" in result.output
    assert not (tmp_path / "out").exists()


def test_show_prints_and_draws(run, model_dir, tmp_path):
    scenes.make_scene(11).image.save(tmp_path / "scene.png")
    result = run("show", "scene.png", "--model", model_dir, "--keep", "25%", "--out", "x.png")
    assert result.exit_code == 0, result.output
    assert "how many digits ?" in result.output
    assert "fastervlm, 64 of 256 visual tokens" in result.output
    assert (tmp_path / "x.png").stat().st_size > 10_000


def test_list_describes_every_strategy(run):
    result = run("list")
    assert result.exit_code == 0
    lines = dict(line.split(maxsplit=1) for line in result.output.splitlines())
    assert {"random", "strided", "fastervlm", "vtc_cls", "divprune", "visionzip"} <= set(lines)
    assert lines["divprune"].startswith("DivPrune: keep the subset")


def test_a_missing_extra_is_named():
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_TYPER, "sweep"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.strip() == (
        "typer is not installed; it comes with pip install 'vtprune[eval]'."
    )
