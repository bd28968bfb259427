"""The benchmark of a model: what is attributed to which phase, free pruning, what is left out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import vtprune
from tests.eval.bench_tiny import write_tiny
from vtprune.engine import instance, wrap
from vtprune.engine.report import Report
from vtprune.errors import ConfigError, UnsupportedError
from vtprune.eval import tiny
from vtprune.eval.bench_model import Bench, Stopwatch, n_visual, parts_of
from vtprune.eval.bench_model_inputs import Made
from vtprune.eval.bench_model_random import random_model
from vtprune.eval.budgets import Point
from vtprune.strategies.fastervlm import FasterVLM

CPU = torch.device("cpu")
LOGITS = {"output_logits": True, "return_dict_in_generate": True}


@pytest.fixture
def model(tmp_path):
    return random_model(write_tiny(tmp_path), CPU, "float32")


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
