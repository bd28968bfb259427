"""The benchmark of a model: what is attributed to which phase, free pruning, the command."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import vtprune
from tests.eval.bench_tiny import write_tiny
from vtprune.engine import instance, wrap
from vtprune.engine.report import Report
from vtprune.errors import ConfigError, UnsupportedError
from vtprune.eval import tiny
from vtprune.eval.bench_model import Bench, Stopwatch, n_visual, parts_of
from vtprune.eval.bench_model_inputs import Made
from vtprune.eval.bench_model_random import random_model
from vtprune.eval.bench_model_rows import PARTS, PHASES
from vtprune.eval.budgets import Point
from vtprune.eval.cli import app
from vtprune.strategies.fastervlm import FasterVLM

CPU = torch.device("cpu")
LOGITS = {"output_logits": True, "return_dict_in_generate": True}


@pytest.fixture
def model(tmp_path):
    return random_model(write_tiny(tmp_path), CPU, "float32")


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


def bench(model, *points, sizes=((42, 42),), **kwargs):
    named = [Point(*point.split()) for point in ("random 9", *points)]
    return Bench(model, Made(model), named, sizes=sizes, **{"decode_tokens": 2, **kwargs})


# -- phases ------------------------------------------------------------------------------------


class Clock:
    """Seconds that pass only where the test says so."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def spend(self, seconds: float) -> None:
        self.seconds += seconds


@pytest.fixture
def clock(model, monkeypatch):
    """100 s in the tower, 5 in scoring, 3 in shortening; a prefill takes 10 and 0.1 per token."""
    clock = Clock()
    monkeypatch.setattr(instance, "time", SimpleNamespace(perf_counter=lambda: clock.seconds))

    def language(module: Any, args: Any, kwargs: Any) -> None:
        n = kwargs["inputs_embeds"].shape[1]
        clock.spend(1 if n == 1 else 10 + 0.1 * n)

    model.model.vision_tower.register_forward_pre_hook(lambda *args: clock.spend(100))
    model.model.language_model.register_forward_pre_hook(language, with_kwargs=True)
    score, compact = FasterVLM.score, wrap.compact
    monkeypatch.setattr(FasterVLM, "score", lambda *args: (clock.spend(5), score(*args))[1])
    monkeypatch.setattr(wrap, "compact", lambda *args: (clock.spend(3), compact(*args))[1])
    return clock


def test_every_phase_gets_its_own_seconds(model, clock):
    run = bench(model, "fastervlm 9")
    assert run.run(2) == 2
    none, _, ours = run.rows()
    medians = [
        {name: spread.median / 1000 for name, spread in row.phases.items()} for row in (none, ours)
    ]
    unpruned = {"encoder": 100, "scoring": 0, "compaction": 0, "prefill": 16.8}  # of 36 + 32
    pruned = {"encoder": 100, "scoring": 5, "compaction": 3, "prefill": 14.1}  # of 9 + 32
    for found, parts in zip(medians, (unpruned, pruned), strict=True):
        assert found == pytest.approx(
            {**parts, "decode_per_token": 1, "end_to_end": sum(parts.values()) + 2}
        )
    assert ours.over_free == pytest.approx((5 + 3 + 14.1) / 14.1)
    assert ours.scoring_share == pytest.approx(5 / 16.8)
    # 8 s are earned by 80 tokens of 0.1 s, but there are 36.
    assert ours.break_even is None
    assert run.groups[0].free == {
        n: pytest.approx([10000 + 100 * (n + 32)] * 2) for n in (36, 27, 18, 9)
    }


def test_the_break_even_count_is_where_the_cost_is_earned(model, clock, monkeypatch):
    monkeypatch.setattr(clock, "spend", lambda s: setattr(clock, "seconds", clock.seconds + s))
    score = FasterVLM.score
    monkeypatch.setattr(FasterVLM, "score", lambda *args: (clock.spend(-6.5), score(*args))[1])
    run = bench(model, "fastervlm 9")
    run.run(1)
    assert run.rows()[2].break_even == 15  # 5 - 6.5 + 3 s at 0.1 s a token


def test_a_part_of_a_part_is_counted_once():
    parts = {"encode.score": 5.0, "encode.score.compact": 2.0, "encode.compact": 1.0}
    parts |= {"compact": 3.0, "language.score": 4.0}
    report = Report("some", (), ms={"encode": 20.0, "language": 30.0}, parts=parts)
    assert parts_of(report, 60.0) == {
        "encoder": 14.0,
        "scoring": 9.0,
        "compaction": 4.0,
        "prefill": 33.0,
    }


def test_a_stopwatch_notes_every_token(model):
    watch = Stopwatch(CPU)
    model.generate(**Made(model)(2, (42, 42)), max_new_tokens=4, do_sample=False, streamer=watch)
    assert len(watch.at) == 5 and watch.at == sorted(watch.at)


# -- free pruning ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "size"),
    [
        ("llava", (42, 42)),
        ("llava_next", (56, 40)),
        ("llava_onevision", (70, 50)),
        ("internvl", (84, 84)),
        ("qwen2_vl", (84, 56)),
        ("qwen2_5_vl", (84, 56)),
        ("qwen3_vl", (84, 56)),
    ],
)
@pytest.mark.parametrize("strategy", ["divprune", "visionzip"])
def test_free_pruning_is_the_same_work(family, size, strategy):
    model, _ = tiny.build(family)
    run = Bench(model, Made(model), [Point(strategy, "50%")], sizes=[size], decode_tokens=1)
    inputs = Made(model)(2, size)
    prompt, report, inside = run._recorded(inputs, Point(strategy, "50%"))
    kept = report.of_sample(0)[1]
    assert not inside and kept < report.of_sample(0)[0]
    assert kept == n_visual(run.adapter, prompt) == run.groups[0].settings[1].free
    with vtprune.wrap(model, strategy, keep=0.5):
        pruned = model.generate(**inputs, max_new_tokens=3, do_sample=False, **LOGITS)
    model.generate(**prompt)  # which leaves it as it was
    free = model.generate(**{**prompt, "max_new_tokens": 3}, **LOGITS)
    assert [torch.equal(*pair) for pair in zip(pruned.logits, free.logits, strict=True)] == [
        True
    ] * 3
    n = inputs["input_ids"].shape[1]
    short = prompt["input_ids"].shape[1]
    assert n - short == report.of_sample(0)[0] - kept
    assert torch.equal(pruned.sequences[:, n:], free.sequences[:, short:])


def test_the_whole_prompt_given_is_the_bare_model(model):
    run = bench(model)
    inputs = Made(model)(1, (42, 42))
    whole, _, _ = run._recorded(inputs, Point("strided", "100%"))
    bare = model.generate(**inputs, max_new_tokens=2, do_sample=False, **LOGITS)
    given = model.generate(**{**whole, "max_new_tokens": 2}, **LOGITS)
    assert torch.equal(bare.logits[0], given.logits[0])
    assert "pixel_values" not in whole and n_visual(run.adapter, whole) == 36


def test_inside_the_language_model_as_many_tokens_as_enter_a_layer(model):
    (setting,) = bench(model, "fastv 9").groups[0].settings[2:]
    assert setting.kept == 15.75 and setting.free == 16
    (setting,) = bench(model, "shortv 100%").groups[0].settings[2:]
    assert setting.kept == 36 and setting.free is None


def test_the_model_is_as_it_was(model):
    before = dict(vars(model))
    run = bench(model, "fastervlm 9", "fastv 50%")
    run.run(1)
    assert vars(model) == before


def test_turns_are_interleaved_and_the_first_round_warms_up(model, monkeypatch):
    made: list[str] = []
    run = bench(model, "fastervlm 50%")
    for kind in ("_unpruned", "_pruned", "_first_token"):
        assert hasattr(run, kind)
    run._calls = [
        (lambda i=i: made.append(f"call {i}") or len(made), lambda n, i=i: kept[i].append(n))
        for i in range(3)
    ]
    kept: list[list[int]] = [[], [], []]
    steps: list[int] = []
    assert run.run(2, steps.append) == 2
    assert made == ["call 0", "call 1", "call 2"] * 3 and sum(steps) == 9 == 3 * run.turns
    assert kept == [[4, 7], [5, 8], [6, 9]]


@pytest.mark.parametrize(("at", "done"), [(2, None), (5, None), (7, 1), (12, 2)])
def test_ctrl_c_leaves_whole_rounds(model, at, done):
    run, turns = bench(model), []

    def call():
        turns.append(1)
        if len(turns) == at:
            raise KeyboardInterrupt
        return 1.0

    first = run.groups[0].free[36]
    run._calls = [(call, first.append), (call, lambda x: None), (call, lambda x: None)]
    if done is None:
        with pytest.raises(KeyboardInterrupt):
            run.run(5)
    else:
        assert run.run(5) == done == len(first)


# -- what does not fit ---------------------------------------------------------------------------


def test_what_does_not_fit_is_an_error_or_left_out(model):
    with pytest.raises(UnsupportedError, match="sparsifiner"):
        bench(model, "sparsifiner 50%")
    with pytest.raises(ConfigError, match="keep=40, but an image has 36"):
        bench(model, "fastervlm 40")
    run = bench(model, "sparsifiner 50%", "fastervlm 9", lenient=True)
    assert [one.strategy for one in run.groups[0].settings] == ["none", "random", "fastervlm"]
    assert len(run.refused) == 1 and run.refused[0].startswith("sparsifiner 50%: ")


def test_more_tokens_than_a_picture_has_are_an_error_too():
    model, _ = tiny.build("qwen2_5_vl")
    points = [Point("strided", "20")]
    with pytest.raises(ConfigError, match="keep=20, but the image has 16 tokens at this resol"):
        Bench(model, Made(model), points, sizes=[(56, 56)])
    run = Bench(model, Made(model), points, sizes=[(70, 70)])
    assert run.groups[0].settings[1].kept == 20


def test_what_takes_too_much_memory_is_left_out(model, monkeypatch):
    recorded = Bench._recorded

    def some(self, inputs, point):
        if len(inputs["input_ids"]) * (point.strategy == "fastervlm") > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        if len(inputs["input_ids"]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return recorded(self, inputs, point)

    monkeypatch.setattr(Bench, "_recorded", some)
    run = bench(model, "fastervlm 9", batches=(1, 2, 4))
    assert run.refused == [
        "batch 2, 42x42: fastervlm 9: out of memory",
        "batch 4, 42x42: out of memory unpruned",
    ]
    assert [(g.batch, len(g.settings)) for g in run.groups] == [(1, 3), (2, 2)]
    run.run(1)
    assert len(run.rows()) == 5
    with pytest.raises(ConfigError, match=r"Nothing can be measured. batch 4, 42x42: out of mem"):
        bench(model, batches=(4,))


# -- the command ---------------------------------------------------------------------------------


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


def test_a_gpu_tells_its_memory(model, monkeypatch):
    run, asked = bench(model), []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: asked.append(device))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 << 20)
    inputs = Made(model)(1, (42, 42))
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(type(model), "device", property(lambda self: gpu if asked_gpu else CPU))
    asked_gpu = True
    generate = model.generate

    def on_cpu(**kwargs):
        nonlocal asked_gpu
        asked_gpu = False
        try:
            return generate(**kwargs)
        finally:
            asked_gpu = True

    monkeypatch.setattr(model, "generate", on_cpu)
    ms, mib = run._whole(inputs)
    assert mib == 3 and asked == [gpu] and ms["end_to_end"] > 0


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
