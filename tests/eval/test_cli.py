from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys

import pytest
from PIL import Image
from typer.testing import CliRunner

import vtprune
from vtprune.eval import scenes
from vtprune.eval.budgets import BUDGETS, STRATEGIES, points
from vtprune.eval.cli import app
from vtprune.eval.samples import TASKS
from vtprune.eval.samples_vit import VIT_TASKS
from vtprune.eval.sweep import Sweep
from vtprune.registry import strategy_names

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
        assert picture.size[0] >= 1500  # tokens and FLOPs beside each other
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
    shares = {row["budget"]: row["flops"] for row in summary}
    assert 1 == shares["100%"] > shares["25%"] > shares["4"] > shares["0%"] > 0
    table = (out / "table.md").read_text()
    assert all(f"| {name} | {budget} |" in table for name, budget in names)
    assert f"| 64 | {100 * shares['25%']:.1f} |" in table
    assert "FLOPs: those of the language model's prefill" in table
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
    assert "Interrupted; 16 of 24 answers are in out. This resumes:" in result.output
    assert "strided" in result.output  # the table of what is done
    (line,) = [line for line in result.output.splitlines() if line.startswith("vtprune sweep")]
    resume = shlex.split(line)
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert run(*resume[1:]).exit_code == 0
    rows = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    assert len(rows) == len(set(rows)) == 24


def test_several_tasks_have_a_table_each(run, model_dir, tmp_path):
    tasks = ("--task", "scenes-easy,scenes-read", "--strategy", "strided", "--keep", "25%")
    result = run(*sweep_args(model_dir, *tasks))
    assert result.exit_code == 0, result.output
    out = tmp_path / "out"
    summary = json.loads((out / "summary.json").read_text())
    assert [row["task"] for row in summary] == ["scenes-easy"] * 3 + ["scenes-read"] * 3
    assert {tuple(row["kinds"]) for row in summary if row["task"] == "scenes-read"} == {("read",)}
    for name in ("scenes-easy", "scenes-read"):
        assert f"untrained, {name}\n" in (out / "table.md").read_text()
        assert (out / f"accuracy-{name}.png").exists()


def test_a_damaged_file_is_said_and_completed(run, model_dir, tmp_path):
    assert run(*sweep_args(model_dir)).exit_code == 0
    results = tmp_path / "out" / "results.jsonl"
    whole = results.read_bytes()
    lines = whole.splitlines(keepends=True)
    results.write_bytes(b"".join(lines[:9]) + b"{nonsense}\n" + b"".join(lines[10:]))
    again = run(*sweep_args(model_dir))
    assert again.exit_code == 0
    assert "is damaged after line 9" in again.output
    times = (tmp_path / "out" / "timings.jsonl").read_text().splitlines()
    assert len(times) == len({line.rpartition(",")[0] for line in times}) == 6
    assert results.read_bytes() == whole


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("sweep", "--strategy", "fastvlm"), "Did you mean 'fastervlm'"),
        (("sweep", "--keep", "lots"), "Budget 'lots'"),
        (("sweep", "--model", "mini-lava"), "Did you mean 'mini-llava'"),
        (("sweep", "--out", __file__), "is a file"),
        (("sweep", "--out", "/proc/nothing"), "cannot be"),
        (("sweep", "--task", "scene"), "Did you mean 'scenes'"),
        (("sweep", "--task", ","), "No task was given"),
        (("scenes", "--level", "medium"), "level='medium'"),
        (("scenes", "--out", "scenes.csv"), ".parquet"),
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


def test_show_needs_no_image(run, model_dir, tmp_path):
    asked = scenes.pick_question(scenes.make_scene(5), 5).text
    result = run("show", "--scene", 5, "--model", model_dir, "--out", "x.png")
    assert result.exit_code == 0, result.output
    assert asked in result.output
    assert (tmp_path / "x.png").stat().st_size > 10_000


def test_list_describes_strategies_models_and_tasks(run):
    result = run("list")
    assert result.exit_code == 0
    sections: dict[str, dict[str, str]] = {}
    for line in result.output.splitlines():
        if line.endswith(":"):
            sections[line.rstrip(":")] = {}
        else:
            name, what = line.split(maxsplit=1)
            list(sections.values())[-1][name] = what
    assert set(sections["strategies"]) == set(strategy_names())
    assert sections["strategies"]["divprune"].startswith("DivPrune: keep the subset")
    assert sections["models"]["mini-llava"].startswith("A LLaVA")
    assert "LlavaForConditionalGeneration" in sections["models"]
    vits = {name for tasks in VIT_TASKS.values() for name in tasks}
    assert set(sections["tasks"]) == set(TASKS) | vits


def test_scenes_are_written(run, tmp_path):
    result = run("scenes", "--limit", 3, "--level", "easy")
    assert result.exit_code == 0, result.output
    assert "3 easy scenes (test): scenes.parquet" in result.output
    assert (tmp_path / "scenes.parquet").exists()


def test_doctor(run):
    result = run("doctor")
    assert result.exit_code == 0, result.output
    for word in ("torch", "transformers", "mini-llava"):
        assert word in result.output


def test_the_default_sweep_is_small_enough():
    found = points(STRATEGIES, BUDGETS)
    assert len(STRATEGIES) <= 8
    assert len(found) == 2 + 4 * len(STRATEGIES)
    assert {"random", "strided"} <= set(STRATEGIES)


def test_a_missing_extra_is_named():
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_TYPER, "sweep"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.strip() == (
        "typer is not installed; it comes with pip install 'vtprune[eval]'."
    )


def test_doctor_works_where_other_commands_do_not():
    script = WITHOUT_TYPER.replace('"typer"', '"matplotlib"')
    result = subprocess.run(
        [sys.executable, "-c", script, "doctor"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "mini-llava" in result.stdout


def test_what_is_added_joins_what_is_there(run, model_dir, tmp_path):
    assert run(*sweep_args(model_dir, "--keep", "25%", "--strategy", "strided")).exit_code == 0
    more = run(*sweep_args(f"{model_dir}/", "--keep", "0.25,25%", "--strategy", "random"))
    assert more.exit_code == 0, more.output
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    names = [(row["strategy"], row["budget"]) for row in summary]
    assert names[2:] == [("random", "25%"), ("strided", "25%")]
    assert all(f"| {name} |" in (tmp_path / "out" / "table.md").read_text() for name, _ in names)


def test_ctrl_c_while_loading(run, model_dir, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("vtprune.eval.shipped.load", interrupted)
    result = run(*sweep_args(model_dir))
    assert result.exit_code == 130
    assert "Interrupted; 0 of 24 answers are in out. This resumes:" in result.output


def test_names_are_no_markup(run, model_dir, tmp_path):
    odd = "m_[/x] $\\foo$"  # from the folder that we are in, so that it fits into a line
    shutil.copytree(model_dir, tmp_path / odd)
    result = run(*sweep_args(odd, "--strategy", "strided", "--keep", "25%", "--limit", 2))
    assert result.exit_code == 0, result.output
    assert "m_[/x]" in result.output


def test_version(run):
    assert run("--version").output.strip() == vtprune.__version__
