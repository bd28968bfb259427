"""``vtprune bench MODEL``: what it prints and writes, and what it refuses."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from tests.eval.bench_tiny import write_tiny
from vtprune.eval.bench_model import Bench
from vtprune.eval.bench_model_rows import PARTS, PHASES
from vtprune.eval.cli import app


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the command on a tiny model, in an empty folder."""
    config = write_tiny(tmp_path)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    quick = ("--random-weights", config, "--rounds", "1", "--decode-tokens", "2", "--device", "cpu")

    def invoke(*args, given=quick):
        return CliRunner().invoke(app, ["bench", *given, *map(str, args)])

    return invoke


def test_the_command_writes_what_a_report_reads(run, tmp_path):
    given = ("--strategy", "fastervlm,fastv,shortv", "--keep", "9", "--batch-size", "1,2")
    done = run(*given, "--out", "out")
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "empty" / "out" / "bench.json").read_text())
    rows, settings = found["rows"], found["settings"]
    one = ["none 100%", "random 9", "fastervlm 9", "fastv 9", "shortv 100%"]
    assert [f"{row['strategy']} {row['budget']}" for row in rows] == one * 2
    assert [row["batch"] for row in rows] == [1] * 5 + [2] * 5
    for row in rows:
        assert tuple(row["phases"]) == PHASES and row["peak_mib"] is None
        assert all(s["p20"] <= s["median"] <= s["p80"] for s in row["phases"].values())
        assert (row["resolution"], row["visual_tokens"]) == ("42x42", 36)
        all_stay = row["strategy"] in ("none", "shortv")
        assert (row["over_free"] is None) == (row["over_random"] is None) == all_stay
        assert (row["scoring_share"] is None) == (row["strategy"] == "none")
    assert [row["kept"] for row in rows[:5]] == [36, 9, 9, 15.75, 36]
    assert rows[1]["over_random"] == 1
    assert settings["batch_sizes"] == [1, 2] and settings["decode_tokens"] == 2
    assert settings["rounds"] == 1 and settings["attention"] == "sdpa" and settings["words"] == 32
    assert settings["dtype"] == "float32" and settings["versions"]["torch"] == torch.__version__
    assert settings["command"].startswith("vtprune bench --random-weights ")
    assert settings["command"].endswith(" --keep 9 --batch-size 1,2 --out out")
    text = (tmp_path / "empty" / "out" / "bench.md").read_text()
    for part in ("batch 2, 42x42 pixels", "break-even: visual tokens", settings["command"]):
        assert part in text
        assert " ".join(part.split()) in " ".join(done.output.split())


@pytest.mark.slow
def test_all_strategies_that_fit_are_measured(run):
    done = run("--strategy", "all", "--keep", "25%")
    assert done.exit_code == 0, done.output
    assert "sparsifiner 100%: " in done.output and "dyvte 25%: " in done.output
    for name in ("cdpruner", "visiondrop", "prumerge", "zipvl", "flowcut"):
        assert f"\n {name} " in done.output


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--random-weights", "llava-1.5"), "Unknown configuration 'llava-1.5'. Did you mean 'lla"),
        (("--random-weights", "none.json"), "Unknown configuration 'none.json'"),
        (("mini-llava", "--random-weights", "llava-300m"), "give one of the two"),
        (("--keep", "4"), "give one of the two"),
        (("mini-lava",), "Unknown model 'mini-lava'. Did you mean 'mini-llava'?"),
        (("mini-vit",), "mini-vit is a ViT; bench measures vision-language models."),
        (("mini-llava", "--attention", "no"), "--attention 'no' cannot be used"),
    ],
)
def test_a_model_that_is_not_to_be_had_is_refused(run, given, said):
    done = run(given=given)
    assert done.exit_code == 2 and said in done.output, done.output
    assert len(done.output.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--batch-size", "0"), "--batch-size '0': give whole numbers from 1 on"),
        (("--batch-size", "1,-2"), "--batch-size '-2'"),
        (("--batch-size", ""), "--batch-size ''"),
        (("--resolution", "big"), "--resolution 'big' is not understood"),
        (("--keep", "37", "--strategy", "divprune"), "keep=37, but an image has 36 tokens"),
        (("--keep", "0"), "Budget '0'"),
        (("--keep", ""), "No budget was given"),
        (("--strategy", "fastvlm"), "Did you mean 'fastervlm'"),
        (("--strategy", ""), "No strategy was given"),
        (("--strategy", "sparsifiner"), "sparsifiner"),
        (("--device", "gpu"), "device='gpu' cannot be used"),
        (("--device", "meta"), "device='meta' cannot be timed"),
        (("--dtype", "fp8"), "Unknown dtype 'fp8'"),
        (("--out", __file__), "is a file"),
        (("--rounds", "0"), "Invalid value"),
        (("--decode-tokens", "0"), "Invalid value"),
        (("--nothing", "0"), "No such option"),
    ],
)
def test_bad_options_are_refused(run, tmp_path, given, said):
    done = run(*given)
    assert done.exit_code == 2 and said in done.output, done.output
    assert not list((tmp_path / "empty").iterdir())


def test_ctrl_c_shows_the_rounds_before(run, monkeypatch, tmp_path):
    turns: list[int] = []
    whole = Bench._whole

    def some(self, inputs):
        turns.append(1)
        if len(turns) == 9:  # of two per round: none and random
            raise KeyboardInterrupt
        return whole(self, inputs)

    monkeypatch.setattr(Bench, "_whole", some)
    done = run("--strategy", "random", "--rounds", "9", "--out", "out")
    assert done.exit_code == 130, done.output
    assert "Interrupted after 3 of 9 rounds." in done.output
    found = json.loads((tmp_path / "empty" / "out" / "bench.json").read_text())
    assert found["settings"]["rounds"] == 3 and len(found["rows"]) == 2


def test_kernels_and_help_are_still_there(run):
    assert "Operations with commas" in run("kernels", "--help", given=()).output
    listed = run("--help", given=())
    assert listed.exit_code == 0 and "kernels" in listed.output and "model" in listed.output
    assert "--random-weights" in run("mini-llava", "--help", given=()).output


@pytest.mark.slow
def test_a_configuration_is_measured_and_its_phases_sum_to_the_whole_call(run, tmp_path):
    """On a model that takes seconds; what else the machine does makes the two differ."""
    given = ("--random-weights", "llava-300m", "--strategy", "fastervlm", "--keep", "64")
    few = ("--rounds", "1", "--decode-tokens", "2", "--device", "cpu", "--out", "out")
    done = run(given=(*given, *few))
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "empty" / "out" / "bench.json").read_text())
    assert found["settings"]["parameters"] == pytest.approx(311e6, rel=0.01)
    for row in found["rows"]:
        ms = {name: spread["median"] for name, spread in row["phases"].items()}
        summed = sum(ms[name] for name in PARTS) + 2 * ms["decode_per_token"]
        assert summed == pytest.approx(ms["end_to_end"], rel=0.5)
    none, control, ours = found["rows"]
    assert (none["visual_tokens"], control["kept"], ours["kept"]) == (576, 64, 64)
    assert ours["phases"]["prefill"]["median"] < none["phases"]["prefill"]["median"] / 2
    assert 0 < ours["scoring_share"] < 0.2 and 0 < ours["break_even"] < 512


@pytest.mark.slow
def test_a_shipped_model_is_measured(run, tmp_path):
    few = ("--strategy", "fastervlm,divprune", "--keep", "64", "--rounds", "2")
    done = run(*few, "--decode-tokens", "3", "--out", "out", given=("mini-llava",))
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "empty" / "out" / "bench.json").read_text())
    assert [row["kept"] for row in found["rows"]] == [256, 64, 64, 64]
    assert found["settings"]["model"] == "mini-llava"
    assert found["settings"]["command"].startswith("vtprune bench mini-llava --strategy fasterv")
    for row in found["rows"][1:]:
        assert 0.3 < row["over_free"] < 10 and 0 < row["scoring_share"] < 1
    assert found["rows"][0]["phases"]["prefill"]["median"] > 0
