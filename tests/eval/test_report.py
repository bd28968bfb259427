"""What a report reads, and the figures in it."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import asdict, replace

import pytest
from scipy.stats import binomtest

from tests.eval.report_folder import (
    POINTS,
    SETTINGS,
    answers,
    bench_row,
    timings,
    write,
    write_bench,
)
from vtprune import ConfigError
from vtprune.eval import report_charts as charts
from vtprune.eval.budgets import CEILING, FLOOR, Point
from vtprune.eval.compare import differences
from vtprune.eval.lmms_metrics import Metrics
from vtprune.eval.report_bench import COLUMNS as PHASE_COLUMNS
from vtprune.eval.report_bench import read_bench
from vtprune.eval.report_data import read_run
from vtprune.eval.report_tables import COLUMNS, FLOPS, TIME, TOKENS, front, p_text, tasks_of
from vtprune.eval.results import Folder, read_commands
from vtprune.eval.stats import changes, summarize
from vtprune.eval.tables import cells


def task_of(folder):
    run = read_run(folder)
    assert run.swept is not None
    (task,) = tasks_of(run.swept)
    return task


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "run")


def test_rows_are_those_of_the_sweep_tables(folder):
    task = task_of(folder)
    points = [Point(*names) for names in POINTS]
    summaries = summarize(points, answers(), timings())
    assert task.summaries == summaries
    for row, summary in zip(task.rows, summaries, strict=True):
        texts = cells(summary)
        assert row.cells[:4] == texts[:4]
        assert row.cells[7:12] == texts[4:]
        assert len(row.cells) == len(COLUMNS)
    assert [row.reference for row in task.rows] == [True, True, True, True, False, False]


def test_lost_gained_and_p(folder):
    found = {(r.cells[0], r.cells[1]): r.cells[4:7] for r in task_of(folder).rows}
    assert found["unpruned", "100%"] == ("", "", "")
    assert found["random", "25%"] == ("3", "0", f"{binomtest(0, 3).pvalue:.2g}")
    assert found["hiprune", "50%"] == ("0", "1", "1")
    assert changes([True] * 3, [True] * 3).p == 1.0
    assert changes([False] * 12, [True] * 12) == changes([0.0] * 12, [0.5] * 12)
    assert changes([False] * 12, [True] * 12).p == pytest.approx(2 / 2**12)
    assert p_text(0.0625) == "0.062"
    assert p_text(9.9e-5) == "<0.0001"


def test_kinds_are_those_of_compare(folder):
    task = task_of(folder)
    assert [(kind.name, kind.n) for kind in task.kinds] == [("count", 3), ("read", 3)]
    lines = {(line.row.cells[0], line.row.cells[1]): line.shares for line in task.lines}
    for one in differences(answers(), "unpruned"):
        shares = lines[one.point.strategy, one.point.budget]
        assert [share and share[1] for share in shares] == pytest.approx(
            [100 * one.kinds["count"], 100 * one.kinds["read"]]
        )
    assert lines["unpruned", "100%"] == [(pytest.approx(200 / 3), None), (100.0, None)]
    by_kind = summarize([CEILING], [r for r in answers() if r.kind == "count"], [])
    assert task.kinds[0].rows[0].cells[:4] == cells(by_kind[0])[:4]


def test_one_kind_needs_no_table(tmp_path):
    assert task_of(write(tmp_path / "run", rows=answers(kind="read"))).kinds == []


def test_a_kind_that_a_point_has_not_come_to(tmp_path):
    rows = [r for r in answers() if r.strategy != "hiprune" or r.kind == "read"]
    task = task_of(write(tmp_path / "run", rows=rows))
    assert task.lines[-1].shares[0] is None
    assert task.lines[-1].shares[1] is not None


def test_the_front_is_what_no_other_point_beats(folder):
    summaries = task_of(folder).summaries
    names = [(s.strategy, s.budget) for s in front(summaries, TOKENS)]
    assert names == [("hiprune", "25%"), ("hiprune", "50%")]  # unpruned is dearer, and less right
    names = [(s.strategy, s.budget) for s in front(summaries, TIME)]
    assert names == [("random", "25%"), ("random", "50%"), ("hiprune", "50%")]
    fronts = {(r.cells[0], r.cells[1]): r.cells[-1] for r in task_of(folder).rows}
    assert fronts["hiprune", "50%"] == "tokens, FLOPs, time"
    assert fronts["hiprune", "25%"] == "tokens, FLOPs"
    assert fronts["blind", "0%"] == fronts["unpruned", "100%"] == ""


def test_equals_share_the_front(folder):
    one = task_of(folder).summaries[4]
    twin = replace(one, strategy="twin")
    dearer = replace(one, strategy="dearer", kept=one.kept + 1)
    assert front([dearer, twin, one], TOKENS) == [twin, one]


def test_charts_show_the_figures(folder):
    task = task_of(folder)
    assert [axis.name for axis in task.axes] == ["tokens", "FLOPs", "time"]
    drawn = charts.accuracy(task, TIME)
    first, *lines = drawn["data"]
    assert first["name"] == "Pareto front"
    assert list(first["y"]) == [100 * s.accuracy.value for s in front(task.summaries, TIME)]
    assert [line["name"] for line in lines] == ["random (baseline)", "hiprune"]
    _, _, _, _, half, quarter = task.summaries
    whole = task.summaries[0]
    hiprune = lines[1]
    assert list(hiprune["x"]) == [s.ms for s in (quarter, half, whole)]
    assert list(hiprune["y"]) == [100 * s.accuracy.value for s in (quarter, half, whole)]
    above = [100 * (s.accuracy.high - s.accuracy.value) for s in (quarter, half, whole)]
    assert list(hiprune["error_y"]["array"]) == above
    assert hiprune["error_y"]["visible"]
    assert "vs unpruned: +16.7 [" in hiprune["hovertext"][1]
    levels = [shape["y0"] for shape in drawn["layout"]["shapes"]]
    assert levels == [100 * whole.accuracy.value, 100 * task.summaries[1].accuracy.value]


def test_bars_stand_beside_each_other_on_logarithmic_axes(folder):
    task = task_of(folder)
    _, random, hiprune = charts.accuracy(task, TOKENS)["data"]
    assert random["x"][0] < 64 < hiprune["x"][0] < 66
    assert random["x"][-1] == hiprune["x"][-1] == 256
    assert charts.accuracy(task, FLOPS)["layout"]["xaxis"]["type"] == "log"


def test_what_is_not_known_has_no_axis(tmp_path):
    task = task_of(write(tmp_path / "run", rows=answers(flops=None), times=[]))
    assert [axis.name for axis in task.axes] == ["tokens"]


def test_names_of_axes_fit_vits(tmp_path):
    settings = replace(SETTINGS, max_new_tokens=0)
    task = task_of(write(tmp_path / "run", settings))
    assert "left in the end" in task.axes[0].label
    assert "tower" in task.axes[1].label


def test_marks_between_right_and_wrong(tmp_path):
    rows = [replace(r, right=0.5) if r.strategy == "hiprune" else r for r in answers()]
    rows = [replace(r, task="lmms:vqa") for r in rows if r.sample < 5]
    folder = write(tmp_path / "run", replace(SETTINGS, task="lmms:vqa"), rows, timings("lmms:vqa"))
    values = {"vqa": {"exact,none": {"value": 0.5, "stderr": 0.01}}}
    metrics = [Metrics("lmms:vqa", "hiprune", "50%", 5, 128.0, values)]
    metrics += [Metrics("lmms:vqa", "unpruned", "100%", 5, 256.0, values)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(asdict(m)) + "\n" for m in metrics))
    run = read_run(folder)
    assert run.swept is not None
    assert run.swept.notes == []  # the benchmark says how many samples there are
    (task,) = tasks_of(run.swept)
    assert task.rows[4].cells[4:6] == ("5", "0")
    (lines,) = task.metrics.values()
    assert [line[:3] for line in lines] == [
        ("strategy", "budget", "exact"),
        ("unpruned", "100%", "0.5 ± 0.01"),
        ("hiprune", "50%", "0.5 ± 0.01"),
    ]
    (folder / "results.jsonl").write_text("")
    run = read_run(folder)
    assert run.swept is not None
    (task,) = tasks_of(run.swept)
    assert (task.rows, task.axes, len(task.metrics)) == ([], [], 1)


def test_points_are_in_order(tmp_path):
    swept = read_run(write(tmp_path / "run", rows=answers()[::-1])).swept
    assert swept is not None
    assert swept.points[:2] == [CEILING, FLOOR]
    assert [p.budget for p in swept.points[2:]] == ["50%", "25%", "50%", "25%"]


def test_what_is_damaged_or_missing_is_noted(folder):
    file = folder / "results.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:20]) + '{"nonsense": 1}\n' + "".join(lines[20:]))
    swept = read_run(folder).swept
    assert swept is not None
    assert len(swept.answers) == 20
    damaged, short = swept.notes
    assert damaged == (
        "results.jsonl: what comes after line 20 is damaged or not whole, and left out."
    )
    assert short.startswith("6 of 6 points have fewer than 6 answers, such as unpruned 100%")
    assert file.read_text().count("nonsense") == 1  # nothing is taken away
    assert not list(folder.glob("*.damaged*"))


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda f: [p.unlink() for p in f.iterdir()], "holds neither results.jsonl nor bench.json"),
        (lambda f: (f / "settings.json").unlink(), "cannot be told what was measured"),
        (lambda f: (f / "settings.json").write_text('{"mod'), "cannot be told what was measured"),
        (lambda f: (f / "settings.json").write_text('{"model": "m"}'), "this version of vtprune"),
        (lambda f: (f / "settings.json").write_text("[]"), "this version of vtprune"),
        (
            lambda f: (f / "settings.json").write_text(
                json.dumps(asdict(SETTINGS) | {"seed": "0"})
            ),
            "this version of vtprune",
        ),
        (
            lambda f: (f / "settings.json").write_text(
                json.dumps(asdict(SETTINGS) | {"task": "clips"})
            ),
            "answers to scenes, but settings.json is of a sweep of clips",
        ),
        (lambda f: (f / "results.jsonl").write_text(""), "no whole answers. It is empty."),
        (lambda f: (f / "results.jsonl").write_text("junk\n"), "after line 0 is damaged"),
        (lambda f: (f / "commands.json").write_text("{"), "commands.json is damaged"),
        (lambda f: (f / "commands.json").write_text("[1]"), "commands.json is damaged"),
    ],
)
def test_what_cannot_be_reported_is_said(folder, break_it, said):
    break_it(folder)
    with pytest.raises(ConfigError, match=said):
        read_run(folder)


def test_a_folder_remembers_its_commands(tmp_path):
    path = tmp_path / "run"
    for command in (
        "vtprune sweep --limit 1",
        "vtprune sweep --hint 'a\nb'",
        "vtprune sweep --limit 1",
    ):
        with closing(Folder(path, SETTINGS)) as folder:
            folder.remember(command)
    assert read_commands(path) == ["vtprune sweep --limit 1", "vtprune sweep --hint 'a\nb'"]
    (path / "commands.json").write_text("[")
    with closing(Folder(path, SETTINGS)) as folder, pytest.raises(ConfigError, match="damaged"):
        folder.remember("vtprune sweep")


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        read_run(tmp_path / "nothing")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is a file"):
        read_run(tmp_path / "file")


def test_phases(tmp_path):
    run = read_run(write_bench(tmp_path / "run"))
    assert run.swept is None
    assert run.bench is not None
    assert list(run.bench.groups()) == [
        "batch 1, 336x336 pixels, 576 visual tokens",
        "batch 4, 336x336 pixels, 576 visual tokens",
    ]
    rows = run.bench.groups()["batch 1, 336x336 pixels, 576 visual tokens"]
    cells = dict(zip(PHASE_COLUMNS, rows[1].cells, strict=True))
    assert (cells["strategy"], cells["scoring"], cells["vs free"]) == ("hiprune", "2", "1.070")
    assert (cells["scoring, %"], cells["break-even"]) == ("2.13", "48")
    drawn = charts.phases(rows)
    assert [bar["name"] for bar in drawn["data"]] == ["encoder", "scoring", "compaction", "prefill"]
    assert list(drawn["data"][0]["y"]) == ["unpruned", "hiprune 64"]
    assert list(drawn["data"][1]["x"]) == [2.0, 2.0]
    assert "scoring: 2 ms [1.8, 2.2]" in drawn["data"][1]["hovertext"][0]
    assert ("versions", "torch 2") in list(run.bench.conditions())


@pytest.mark.parametrize(
    "changes",
    [
        {"rows": []},
        {"settings": {"model": "m"}},
        {"rows": [bench_row("a", "1") | {"kept": None}]},
        {"rows": [bench_row("a", "1") | {"phases": {}}]},
        {"rows": [bench_row("a", "1", scoring=float("nan"))]},
        {"rows": [bench_row("a", "1") | {"other": 1}]},
        {"rows": [bench_row("a", "1") | {"over_free": "1.0"}]},
        {"rows": [[1]]},
    ],
)
def test_a_benchmark_that_is_none(tmp_path, changes):
    with pytest.raises(ConfigError, match=r"bench.json is not what this version"):
        read_bench(write_bench(tmp_path / "run", **changes) / "bench.json")
