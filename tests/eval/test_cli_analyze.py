"""``vtprune analyze``: what it prints and writes, what a report makes of it, what it refuses."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from tests.eval.report_folder import Page, write
from vtprune import ConfigError, UnsupportedError
from vtprune.eval import analyze as analyzing
from vtprune.eval.analyze import Analysis, Options
from vtprune.eval.analyze_output import COLUMNS, STAGED, parts
from vtprune.eval.budgets import CEILING, Point
from vtprune.eval.cli import app
from vtprune.eval.report_analysis import read_analysis
from vtprune.eval.report_analysis_charts import CHARTS, charts, pictures
from vtprune.eval.sweep import settings_of

pytestmark = pytest.mark.slow

POINTS = ["unpruned 100%", "fastervlm 25%", "fastv 25%", "shortv(layers=(3,)) 100%"]


def run(*args):
    return CliRunner().invoke(app, [*map(str, args)])


@pytest.fixture(scope="module")
def out(model_dir, tmp_path_factory):
    """The folder of an analysis of an untrained model."""
    folder = tmp_path_factory.mktemp("analyzed") / "out"
    given = ("--strategy", "fastervlm,fastv,shortv(layers=(3,))", "--samples", 2)
    more = ("--batch-size", 2, "--draw", 2, "--sink-dims", "auto,3", "--tau", "2.5")
    done = run("analyze", "--model", model_dir, *given, *more, "--exclude-bos", "--out", folder)
    assert done.exit_code == 0, done.output
    assert "Where sinks are" in done.output and str(folder) in done.output.replace("\n", "")
    return folder


def test_what_is_written(out):
    found = json.loads((out / "analysis.json").read_text())
    settings, points = found["settings"], found["points"]
    assert [f"{p['strategy']} {p['budget']}" for p in points] == POINTS
    assert settings["tau"] == 2.5 and 3 in settings["sink_dims"] and settings["exclude_bos"]
    assert "--exclude-bos" in settings["command"].split() and settings["samples"] == 2
    layers = [point["layers"] for point in points]
    assert [len(some) for some in layers] == [12] * 4
    assert [some[-1]["visual"] for some in layers] == [256, 64, 64, 256]
    assert layers[2][0]["visual"] == 256  # fastv: the first layers see all
    assert all(layer["mdi"] > 0 and layer["entropy"] > 0 for some in layers for layer in some)
    assert layers[0] != layers[3]
    maps = [point["maps"] for point in points]
    assert (maps[0], maps[3]) == ([], [])  # where all stay there is nothing to map
    ((whole,), (later,)) = maps[1:3]
    assert (whole["grid"], whole["n"], later["n"]) == ([1, 16, 16], 2, 2)
    assert sum(map(sum, whole["share"])) == pytest.approx(64)
    assert sum(map(sum, later["share"])) == pytest.approx(64)
    gallery = found["gallery"]
    assert [drawn["asked"]["sample"] for drawn in gallery["drawn"]] == [0, 1]
    cards = {card["strategy"] for drawn in gallery["drawn"] for card in drawn["cards"]}
    assert cards == {"fastervlm", "fastv"}
    text = (out / "analysis.md").read_text()
    assert all(f"### {point}" in text for point in POINTS) and "| layer |" in text


@pytest.mark.slow
def test_batches_do_not_change_the_figures(loaded, monkeypatch):
    (model, processor), points = loaded, [CEILING, Point("fastervlm", "25%")]
    monkeypatch.setattr(analyzing, "PROMPTS", 1)

    def figures(size):
        more = {"limit": 3, "batch_size": size, "seed": 0}
        settings = settings_of(model, processor, "m", task="scenes-sizes", **more)
        chosen = Options(sink_dims="3,8", tau=2.0, draw=0)
        made = Analysis(model, processor, points, settings, chosen)
        assert made.look() == 3
        return [tally.found() for tally in made.tallies]

    alone, together = figures(1), figures(3)
    for one, all_ in zip(alone, together, strict=True):
        assert one.right == all_.right and one.n == all_.n == 3
        for a, b in zip(one.layers, all_.layers, strict=True):
            assert vars(a) == pytest.approx(vars(b), rel=1e-3, abs=1e-5)
        assert [m.share for m in one.maps] == [m.share for m in all_.maps]


def test_a_report_shows_it(out, tmp_path):
    page_file = tmp_path / "r.html"
    done = run("report", out, write(tmp_path / "swept"), "--no-overlays", "--out", page_file)
    assert done.exit_code == 0, done.output
    text = page_file.read_text()
    page, seen = Page(text), read_analysis(out / "analysis.json")
    for title, (names, points) in parts(seen.points).items():
        assert page.tables[title] == [names, *(row for rows in points for row in rows)]
    assert set(STAGED) < set(page.tables)
    by_layer = [rows for title, rows in page.tables.items() if "by layer" in title]
    assert [len(rows) for rows in by_layer] == [13] * 4
    assert by_layer[0][0] == ["layer", *COLUMNS]
    drawn = {name: chart for name, chart in page.data.items() if name.startswith("s1-analysis")}
    assert len(drawn) == len(CHARTS)
    names = [line["name"] for line in drawn["s1-analysis-1"]["data"]]
    assert names == ["unpruned", *POINTS[1:]]
    assert "Places that survive with fastervlm 25%" in text
    assert "What fastv kept at 25%" in text
    assert seen.command in page.text


def test_charts_and_pictures_say_what_was_counted(out):
    seen = read_analysis(out / "analysis.json")
    made = charts(seen.points)
    for name, (quantity, _, log, unit) in CHARTS.items():
        for line, found in zip(made[name]["data"], seen.points, strict=True):
            values = [getattr(layer, quantity) for layer in found.layers]
            assert line["y"] == [None if v is None else unit * v for v in values]
        assert (made[name]["layout"]["yaxis"].get("type") == "log") == log
    first, second = pictures(seen.points)
    assert (first.label, first.width, first.height) == ("fastervlm 25%", 16, 16)
    assert "25 on average" in first.what and second.label == "fastv 25%"


@pytest.mark.parametrize(
    "change",
    [
        lambda found: found.pop("points"),
        lambda found: found["points"].clear(),
        lambda found: found["points"][0].pop("right"),
        lambda found: found["points"][0]["layers"][0].update(mdi="<b>"),
        lambda found: found["points"][1]["maps"][0].update(grid=[1, 2, 2]),
        lambda found: found["settings"].pop("model"),
        lambda found: found["gallery"].update(drawn=[1]),
    ],
)
def test_what_is_no_analysis_is_refused(out, tmp_path, change):
    found = json.loads((out / "analysis.json").read_text())
    change(found)
    (tmp_path / "analysis.json").write_text(json.dumps(found))
    with pytest.raises(ConfigError, match="vtprune analyze writes"):
        read_analysis(tmp_path / "analysis.json")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--model", "mini-vit"), "is a ViT"),
        (("--task", "lmms:pope"), "one task"),
        (("--task", "scenes,scenes-hard"), "one task"),
        (("--task", "nothing"), "nothing"),
        (("--tau", "0"), "above 0"),
        (("--tau", "nan"), "above 0"),
        (("--sink-dims", "96"), "0 to 95"),
        (("--keep", "999"), "999"),
        (("--strategy", "fastvv"), "fastv"),
        (("--strategy", "var"), "edits"),
        (("--keep", ""), "No budget"),
    ],
)
def test_what_is_refused(model_dir, tmp_path, args, said):
    model = () if "--model" in args else ("--model", model_dir)
    done = run("analyze", *model, "--samples", 1, "--out", tmp_path / "out", *args)
    assert done.exit_code == 2, done.output
    assert said in done.output.replace("\n", " ")
    assert not (tmp_path / "out").exists()


def test_ctrl_c_keeps_the_batches_that_are_done(model_dir, tmp_path, monkeypatch):
    whole, calls = Analysis.look_at, []

    def interrupted(self, point, batch):
        calls.append(point)
        if len(calls) == 4:  # in the second batch
            raise KeyboardInterrupt
        return whole(self, point, batch)

    monkeypatch.setattr(Analysis, "look_at", interrupted)
    given = ("--strategy", "fastervlm", "--samples", 4, "--batch-size", 1)
    done = run("analyze", "--model", model_dir, *given, "--out", tmp_path / "out")
    assert done.exit_code == 130 and "after 1 of 4" in done.output
    seen = read_analysis(tmp_path / "out" / "analysis.json")
    assert [found.n for found in seen.points] == [1, 1] and seen.settings["samples"] == 1


def test_interventions_are_refused_by_name(loaded):
    model, processor = loaded
    settings = settings_of(model, processor, "m", task="scenes", limit=1, batch_size=1, seed=0)
    with pytest.raises(UnsupportedError, match="rescale_attention"):
        points = [Point("rescale_attention", "100%")]
        Analysis(model, processor, points, settings, Options())
