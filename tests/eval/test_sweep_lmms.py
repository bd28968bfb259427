"""Sweeps of lmms-eval's tasks: what is written, resumed, refused and told."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from lmms_eval.api import task as lmms_task
from PIL import Image
from rich.console import Console

from vtprune import ConfigError
from vtprune.eval.asked import asked
from vtprune.eval.budgets import CEILING, FLOOR, Point, points
from vtprune.eval.export import write_parquet
from vtprune.eval.lmms_benchmarks import find_benchmarks
from vtprune.eval.lmms_metrics import metrics_of, score_of
from vtprune.eval.output import write_output
from vtprune.eval.results import Folder
from vtprune.eval.samples import TASKS
from vtprune.eval.stats import changes, mean_right, paired_difference
from vtprune.eval.sweep import settings_of
from vtprune.eval.sweep_lmms import LmmsSweep

LIMIT, SIZE = 3, 2
PRUNED = Point("hiprune", "25%")
POINTS = points(["hiprune"], ["25%"])
UTILS = """
import vtprune.eval.samples as samples

def doc_to_visual(doc):
    return [doc["image"].convert("RGB")]

def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]

def right(doc, results):
    return {"right": float(samples.answer_of(results[0]) == doc["answer"])}

def marks(doc, results):
    # 0, 1/3, 2/3: by the number of the scene, so that no answer decides
    return {"marks": {"score": doc["index"] % 3 / 3}, "length": len(results[0]), "list": [1, 2]}

def texts(doc, results):
    return {"texts": results[0]}

def mean(items):
    return sum(item["score"] for item in items) / len(items)

def count(items):
    return len(items)
"""
YAML = """
task: {name}
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.doc_to_visual
doc_to_text: !function utils.doc_to_text
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 3, temperature: 0, do_sample: false}}
process_results: !function utils.{scores}
metric_list:
{metrics}
"""
RIGHT = "  - {metric: right, aggregation: mean, higher_is_better: true}"
MARKS = """  - {metric: marks, aggregation: !function utils.mean, higher_is_better: true}
  - {metric: length, aggregation: mean, higher_is_better: false}"""
TEXTS = "  - {metric: texts, aggregation: !function utils.count, higher_is_better: true}"


@pytest.fixture(scope="module")
def include(tmp_path_factory):
    """A folder of tasks: right and wrong, marks, no scores; and one of a group of two."""
    folder = tmp_path_factory.mktemp("tasks")
    write_parquet(folder / "few.parquet", 5)
    (folder / "utils.py").write_text(UTILS)
    for name, scores, metrics in (
        ("vt_right", "right", RIGHT),
        ("vt_marks", "marks", MARKS),
        ("vt_texts", "texts", TEXTS),
    ):
        data = folder / "few.parquet"
        text = YAML.format(name=name, data=data, scores=scores, metrics=metrics)
        (folder / f"{name}.yaml").write_text(text)
    (folder / "group.yaml").write_text("group: vt_group\ntask: [vt_right, vt_marks]\n")
    return folder


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Data sets are cached here, and not where the user has theirs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        lmms_task._resolve_hf_datasets_cache_dir.cache_clear()
        yield
    lmms_task._resolve_hf_datasets_cache_dir.cache_clear()


@pytest.fixture(scope="module")
def sweep(loaded, include):
    """Makes a sweep of tasks by name."""

    def make(*names, limit=LIMIT, chosen=POINTS):
        model, processor = loaded
        found = find_benchmarks([f"lmms:{name}" for name in names], [str(include)])
        settings = settings_of(
            model,
            processor,
            "untrained",
            task=",".join(one.name for one in found),
            limit=limit,
            batch_size=SIZE,
            seed=0,
        )
        return LmmsSweep(model, processor, chosen, settings, benchmarks=found)

    return make


@pytest.fixture(scope="module")
def whole(sweep, tmp_path_factory):
    """The folder of three tasks, each at three points."""
    run = sweep("vt_right", "vt_marks", "vt_texts")
    folder = Folder(tmp_path_factory.mktemp("whole"), run.settings)
    steps = []
    run.run(folder, steps.append)
    assert sum(steps) == run.total == 3 * LIMIT * len(POINTS)
    write_output(folder, run.points, Console(quiet=True))
    folder.close()
    return folder


def metrics(path: Path):
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return {(row["task"], Point(row["strategy"], row["budget"])): row for row in rows}


def test_a_row_per_sample_that_has_a_score(whole):
    rows = whole.answers.rows
    of = {
        name: [row for row in rows if row.task == name] for name in whole.settings.task.split(",")
    }
    assert [len(found) for found in of.values()] == [9, 9, 0]
    samples = TASKS["scenes"].load(0, LIMIT)
    for row in of["lmms:vt_right"]:
        sample = samples[row.sample]
        assert (row.kind, row.question) == (sample.kind, sample.question)
        assert row.expected == sample.expected
        assert type(row.right) is bool
    for row in of["lmms:vt_marks"]:
        assert row.right == row.sample / 3
    assert {type(row.right) for row in of["lmms:vt_marks"]} == {bool, float}
    counts = {row.point: (row.tokens, row.kept, row.flops) for row in rows}
    assert counts[CEILING] == (256, 256, 1)
    assert counts[FLOOR][:2] == (0, 0)
    assert counts[PRUNED][:2] == (256, 64)
    assert counts[PRUNED][2] < 1


def test_metrics_are_those_of_lmms_eval(whole):
    found = metrics(whole.path)
    assert list(found) == [(t, p) for t in whole.settings.task.split(",") for p in POINTS]
    rights = [r.right for r in whole.answers.rows if (r.task, r.point) == ("lmms:vt_right", PRUNED)]
    row = found["lmms:vt_right", PRUNED]
    assert (row["n"], row["kept"]) == (LIMIT, 64)
    assert row["values"]["vt_right"]["right,none"]["value"] == pytest.approx(sum(rights) / 3)
    marks = found["lmms:vt_marks", CEILING]["values"]["vt_marks"]
    assert marks["marks,none"] == {
        "value": pytest.approx(1 / 3),
        "stderr": pytest.approx((1 / 9 / 3) ** 0.5),  # standard deviation 1/3 of three
    }
    assert marks["length,none"]["value"] > 0
    assert "list,none" not in marks
    assert found["lmms:vt_texts", FLOOR]["values"]["vt_texts"]["texts,none"]["value"] == LIMIT


def test_what_is_left_behind(whole):
    summary = json.loads((whole.path / "summary.json").read_text())
    by = {(row["task"], row["strategy"]): row for row in summary}
    assert by["lmms:vt_marks", "hiprune"]["accuracy"]["value"] == pytest.approx(1 / 3)
    assert by["lmms:vt_marks", "hiprune"]["difference"] == {"value": 0, "low": 0, "high": 0}
    assert by["lmms:vt_right", "unpruned"]["ms"] > 0
    text = (whole.path / "metrics.md").read_text()
    assert "lmms:vt_marks\n\n| strategy | budget | marks | length | kept | n |" in text
    assert "| hiprune | 25% | 0.3333 ± 0.19 |" in text
    for name in ("vt_right", "vt_marks"):
        with Image.open(whole.path / f"accuracy-lmms-{name}.png") as picture:
            assert picture.size[0] > 1000


def test_times_are_of_every_batch(whole):
    sizes = [row.size for row in whole.timings.rows if row.point == PRUNED]
    assert sizes == [2, 1] * 3
    assert len(whole.timings.rows) == 2 * 3 * len(POINTS)


class Counting(LmmsSweep):
    ran: list

    def evaluate(self, benchmark, point):
        self.ran.append((benchmark.name, point))
        return super().evaluate(benchmark, point)


def test_what_is_done_is_not_done_again(sweep, tmp_path):
    run = sweep("vt_right")
    run.__class__, run.ran = Counting, []
    folder = Folder(tmp_path, run.settings)
    run.run(folder)
    folder.close()
    assert run.ran == [("lmms:vt_right", point) for point in POINTS]
    results = (tmp_path / "results.jsonl").read_bytes()
    file = tmp_path / "metrics.jsonl"
    told = file.read_text()
    lines = told.splitlines(keepends=True)
    # An end between the answers of the last point and its metrics.
    file.write_text("".join(lines[:-1]) + lines[-1][:20])
    again = sweep("vt_right")
    again.__class__, again.ran = Counting, []
    folder = Folder(tmp_path, again.settings)
    steps = []
    again.run(folder, steps.append)
    folder.close()
    assert again.ran == [("lmms:vt_right", PRUNED)]
    assert sum(steps) == again.total
    assert (tmp_path / "results.jsonl").read_bytes() == results
    assert file.read_text() == told


def test_a_group_is_one_task_with_samples_of_all(sweep, tmp_path):
    run = sweep("vt_group", limit=2, chosen=[CEILING])
    folder = Folder(tmp_path, run.settings)
    run.run(folder)
    folder.close()
    assert run.total == 4
    assert [row.sample for row in folder.answers.rows] == [0, 1, 2, 3]
    assert [row.right for row in folder.answers.rows[:2]] == [False, 1 / 3]  # vt_marks comes first
    assert set(metrics(tmp_path)["lmms:vt_group", CEILING]["values"]) == {"vt_right", "vt_marks"}


def test_a_limit_beyond_the_data_is_all_of_it(sweep):
    assert sweep("vt_right", limit=100, chosen=[CEILING]).total == 5


def test_scores_are_found_in_the_order_of_the_metrics():
    sample = {"a": {"id": 3}, "b": {"score": 0.5}, "c": 1, "d": 40, "e": {"own": 0.25}}
    assert score_of(sample, ["a", "b", "c"], "score") == 0.5
    assert score_of(sample, ["d", "c"], "score") == 1
    assert score_of(sample, ["a", "e"], "own") == 0.25
    assert score_of(sample, ["a", "d", "x"], "score") is None


def test_errors_of_metrics():
    named = {
        "alias": "t",
        "samples": 3,
        " ": " ",
        "a,none": 0.5,
        "a_stderr,none": "N/A",
        "a_stderr_clt,none": 0.1,
        "b,none": "said",
        "b_stderr,none": [],
        "b_stderr_clt,none": float("nan"),
    }
    assert metrics_of({"results": {"t": named, "group": {"alias": "g", " ": " "}}}) == {
        "t": {
            "a,none": {"value": 0.5, "stderr": 0.1},
            "b,none": {"value": "said", "stderr": None},
        }
    }


def test_marks_have_intervals():
    found = mean_right([0.0, 0.5, True])
    assert (found.value, found.low) == (0.5, 0)
    assert found.high == 1
    wide = paired_difference([0.5] * 50 + [0.25] * 50, [0.25] * 100)
    assert wide.value == pytest.approx(0.125)
    assert wide.high - wide.value == pytest.approx(1.96 * 0.125 / 10, rel=0.01)
    assert mean_right([0.5]).low == 0
    turned = changes([0.5, 0.2, 1, 0], [0.2, 0.5, 0, 0])
    assert (turned.gained, turned.lost) == (2, 1)


GIVEN = {"strategy": "hiprune", "keep": "25%", "reduce": "", "hint": ""}


@pytest.mark.parametrize(
    ("vit", "options", "said"),
    [
        ("mini-vit", {"task": "lmms:vt_right"}, "mini-vit answers no questions"),
        (None, {"task": "lmms:vt_right,scenes"}, "scenes is not asked by lmms-eval"),
        (None, {"task": "lmms:vt_right", "hint": "One word."}, "has words of its own"),
        (None, {"task": "scenes", "include_path": "somewhere"}, "Name some of them"),
        (None, {"task": "lmms:vt_right", "include_path": "nowhere"}, "nowhere is no folder"),
    ],
)
def test_what_does_not_go_together_is_refused(vit, options, said):
    with pytest.raises(ConfigError, match=said):
        asked(vit, GIVEN | options, {"task"})


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("output_type: generate_until", "output_type: loglikelihood", "vt_odd.* loglikelihood"),
        pytest.param(  # lmms-eval tries several times
            *("few.parquet", "none.parquet", "'vt_odd' of lmms-eval cannot be loaded: .*none"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_tasks_that_cannot_be_asked_are_refused(include, tmp_path, old, new, said):
    text = (include / "vt_right.yaml").read_text().replace("vt_right", "vt_odd")
    (tmp_path / "utils.py").write_text(UTILS)
    (tmp_path / "vt_odd.yaml").write_text(text.replace(old, new))
    with pytest.raises(ConfigError, match=said):
        find_benchmarks(["lmms:vt_odd"], [str(tmp_path)])


def test_a_folder_is_still_locked_against_another_sweep(whole, tmp_path):
    first = Folder(tmp_path, whole.settings)
    with pytest.raises(ConfigError, match="Another sweep is writing"):
        Folder(tmp_path, whole.settings)
    first.close()


def test_settings_name_lmms_eval(sweep):
    settings = sweep("vt_right", chosen=[CEILING]).settings
    assert "lmms_eval 0." in settings.versions
    assert settings.max_new_tokens == 0
    assert replace(settings, task="scenes") != settings


def test_the_extra_is_named_where_lmms_eval_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    with pytest.raises(ImportError, match=r"pip install 'vtprune\[lmms\]'"):
        asked(None, GIVEN | {"task": "lmms:pope"}, {"task"})
