"""Sweeps of the shipped ViTs: what is right, counted, timed and refused, against plain code."""

from __future__ import annotations

import json
import shlex

import pytest
import torch
from typer.testing import CliRunner

import vtprune
from vtprune import ConfigError, UnsupportedError
from vtprune.eval import mini_clip, mini_vit, shipped
from vtprune.eval.asked import asked
from vtprune.eval.budgets import CEILING, FLOOR, Point, parse_budget, parse_reduce, points
from vtprune.eval.cli import app
from vtprune.eval.results import Folder
from vtprune.eval.scene_captions import make_pair
from vtprune.eval.scene_objects import make_picture
from vtprune.eval.sweep import settings_of
from vtprune.eval.sweep_vit import SWEEPS, ranks

pytest.importorskip("timm")
pytest.importorskip("open_clip")
N = 12
POINTS = points(["random", "tome"], ["50%", "20"], ["8", "0.3"], blind=False)
GIVEN = {"strategy": "tome", "keep": "50%", "reduce": "", "hint": "", "task": ""}


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda *args: CliRunner().invoke(app, [str(arg) for arg in args])


@pytest.fixture(scope="module")
def classifier():
    return shipped.load("mini-vit")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Untrained but saved, so that the folder says what it is."""
    folder = tmp_path_factory.mktemp("clip")
    model = mini_clip.build_model()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.copy_(torch.randn(p.shape, generator=generator) * 1.2 / p.shape[-1] ** 0.5)
    mini_clip.save(model, folder)
    return shipped.load(str(folder))


def swept(loaded, chosen, folder, task, **more):
    model, inputs = loaded
    settings = settings_of(model, inputs, "x", task=task, limit=N, batch_size=5, seed=0, **more)
    run = SWEEPS[inputs.name](model, inputs, chosen, settings)
    found = Folder(folder, settings)
    run.run(found)
    return run, found


def test_rows_of_the_classifier(classifier, tmp_path):
    run, folder = swept(classifier, POINTS, tmp_path / "a", "objects")
    rows = {(row.point, row.sample): row for row in folder.answers.rows}
    assert len(rows) == N * len(POINTS)
    model, pictures = classifier[0], [make_picture(i) for i in range(N)]
    pixels = mini_vit.preprocess(pictures)
    for point, keep in ((CEILING, 196), (Point("tome", "20"), 20)):
        with vtprune.wrap(model, "tome", keep=keep) as handle, torch.no_grad():
            given = model(pixels).argmax(-1).tolist()
            share = handle.report().tower().share
        for i, picture in enumerate(pictures):
            row = rows[point, i]
            assert row.right == (given[i] == picture.label)
            assert row.expected == mini_vit.CLASSES[picture.label]
            assert row.flops == pytest.approx(share, abs=1e-4)
            assert (row.tokens, row.kept) == (196, keep)
    eight = rows[Point("tome", "reduce=8"), 0]
    assert eight.kept == 196 - 8 * 12
    assert rows[Point("tome", "reduce=0.3"), 0].flops == pytest.approx(0.7, abs=0.01)
    assert run.gflops == pytest.approx(0.6146, abs=1e-3)
    assert len(folder.timings.rows) == 3 * len(POINTS)
    assert all(row.ms > 0 for row in folder.timings.rows)


def test_recall_is_that_of_all_pairs(pair, tmp_path):
    tasks = "text-at-1,text-at-5,image-at-1,image-at-5"
    chosen = [CEILING, Point("tome", "25%")]
    _, folder = swept(pair, chosen, tmp_path / "b", tasks)
    model, inputs = pair
    pairs = [make_pair(i) for i in range(N)]
    pixels = inputs.images([one.picture.image for one in pairs])
    ids = inputs.captions([one.caption for one in pairs])
    for point, keep in ((CEILING, 1.0), (chosen[1], 0.25)):
        with torch.no_grad(), vtprune.wrap(model, "tome", keep=keep):
            likeness = model.encode_image(pixels, normalize=True).double()
        likeness = likeness @ model.encode_text(ids, normalize=True).double().T.detach()
        for task in tasks.split(","):
            table, k = likeness.T if task.startswith("image") else likeness, int(task[-1])
            right = [i in row.topk(k).indices.tolist() for i, row in enumerate(table)]
            mine = [r for r in folder.answers.rows if r.point == point and r.task == task]
            assert [row.right for row in mine] == right
            assert {row.kept for row in mine} == {196 * keep}
    assert {row.size for row in folder.timings.rows} == {N}


def test_each_batch_draws_anew(pair, tmp_path, monkeypatch):
    """One choice of places for all pictures would make the baseline a matter of luck."""
    drawn, plain = [], SWEEPS["mini-clip"]._wrap
    monkeypatch.setattr(
        SWEEPS["mini-clip"],
        "_wrap",
        lambda self, point, first: drawn.append(first) or plain(self, point, first),
    )
    swept(pair, [CEILING, Point("random", "25%")], tmp_path / "d", "text-at-1")
    assert drawn == [0, 0, 5, 10]  # the first one checks the point


def test_ranks_by_hand():
    table = torch.tensor([[0.9, 0.1, 0.2], [0.5, 0.4, 0.4], [0.1, float("nan"), 0.7]])
    assert ranks(table) == [0, 2, 1]
    assert ranks(torch.full((3, 3), float("nan"))) == [2, 2, 2]


def test_a_sweep_of_the_command_line(run, tmp_path):
    few = ("--strategy", "strided,tome", "--keep", "30%", "--limit", 4, "--out", "out")
    result = run("sweep", "--model", "mini-vit", *few)
    assert result.exit_code == 0, result.output
    assert "GFLOPs" in result.output and "images" in result.output and "blind" not in result.output
    out = tmp_path / "out"
    table = (out / "table.md").read_text()
    assert "| unpruned | 100% |" in table and "| 0.615 |" in table
    assert (out / "accuracy.png").exists()
    summary = json.loads((out / "summary.json").read_text())
    assert [row["strategy"] for row in summary] == ["unpruned", "strided", "tome"]
    assert run("compare", "out", "--to", "strided").exit_code == 0
    before = (out / "results.jsonl").read_bytes()
    assert run("sweep", "--model", "mini-vit", *few).exit_code == 0
    assert (out / "results.jsonl").read_bytes() == before


def test_reduce_alone_takes_no_keep(run, tmp_path, monkeypatch):
    measure = SWEEPS["mini-vit"].measure
    monkeypatch.setattr(SWEEPS["mini-vit"], "measure", _interrupted)
    args = ("--strategy", "tome", "--reduce", "8,30%", "--limit", 2, "--out", "out")
    result = run("sweep", "--model", "mini-vit", *args)
    (line,) = [line for line in result.output.splitlines() if line.startswith("vtprune sweep")]
    monkeypatch.setattr(SWEEPS["mini-vit"], "measure", measure)
    assert run(*shlex.split(line)[1:]).exit_code == 0
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").open()]
    budgets = [row["budget"] for row in rows]
    assert budgets == ["100%"] * 2 + ["reduce=8"] * 2 + ["reduce=0.3"] * 2


def test_a_dependencyvit_is_whole_with_its_messengers_and_takes_nothing_else(tmp_path):
    loaded = shipped.load("mini-dependencyvit")
    chosen = [CEILING, Point("dependencyvit", "50%")]
    _, folder = swept(loaded, chosen, tmp_path / "a", "objects")
    right = {point: [r.right for r in folder.answers.rows if r.point == point] for point in chosen}
    with vtprune.wrap(loaded[0], "dependencyvit", keep=1.0):
        assert right[CEILING] == mini_vit.right(loaded[0], N)
    assert sum(right[CEILING]) > N / 2 > sum(mini_vit.right(loaded[0], N))
    with pytest.raises(ConfigError, match="random does not fit this ViT"):
        swept(loaded, POINTS, tmp_path / "b", "objects")


def _interrupted(self, point, batch):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("vit", "options", "given", "said"),
    [
        (None, {"reduce": "8"}, {"reduce"}, "--reduce 8: .* of a ViT"),
        ("mini-vit", {"hint": "One word."}, {"hint"}, "mini-vit is asked nothing"),
        ("mini-vit", {"task": "scenes"}, {"task"}, "(?i)unknown task 'scenes'"),
        ("mini-vit", {"task": "text-at-1"}, {"task"}, "(?i)unknown task"),
        ("mini-clip", {"reduce": "x"}, {"reduce"}, "--reduce 'x' is not understood"),
        ("mini-clip", {"keep": ""}, {"keep"}, "No budget was given"),
    ],
)
def test_options_that_make_no_sense(vit, options, given, said):
    with pytest.raises(ConfigError, match=said):
        asked(vit, GIVEN | options, given)


def test_options_are_completed():
    found = asked("mini-clip", GIVEN, set())
    assert [task.name for task in found.tasks] == [
        "text-at-1",
        "text-at-5",
        "image-at-1",
        "image-at-5",
    ]
    assert FLOOR not in found.points and found.options["strategy"] != "tome"
    assert FLOOR in asked(None, GIVEN, {"strategy"}).points
    only = asked("mini-vit", GIVEN | {"reduce": "8"}, {"strategy", "reduce"})
    assert only.points == [CEILING, Point("tome", "reduce=8")]


@pytest.mark.parametrize("text", ["", "-1", "0.0", "1.0", "120%", "8.5x", "0%"])
def test_bad_reduce(text):
    with pytest.raises(ConfigError, match="is not understood"):
        parse_reduce(text)


def test_reduce_is_read():
    assert [parse_reduce(t) for t in ("8", " 0.5 ", "25 %")] == [8, 0.5, 0.25]
    assert parse_budget("reduce=8") == {"reduce": 8}
    assert parse_budget("25%") == {"keep": 0.25}


def test_what_does_not_fit_is_said_before_the_run(classifier):
    chosen = [CEILING, Point("visionzip", "25%"), Point("fastv", "25%"), Point("tome", "25%")]
    model, inputs = classifier
    settings = settings_of(model, inputs, "x", task="objects", limit=2, batch_size=2, seed=0)
    run = SWEEPS["mini-vit"](model, inputs, chosen, settings, lenient=True)
    assert run.points == (CEILING, Point("tome", "25%"))
    with pytest.raises(UnsupportedError):
        SWEEPS["mini-vit"](model, inputs, chosen, settings)


def test_half_precision(tmp_path):
    loaded = shipped.load("mini-vit", dtype="bfloat16")
    _, folder = swept(loaded, [CEILING, Point("tome", "50%")], tmp_path / "c", "objects")
    assert folder.settings.device == "cpu torch.bfloat16"
    assert sum(row.right for row in folder.answers.rows) >= 2 * N - 4
