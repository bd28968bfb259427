"""The page of a report: what it prints, that it needs nothing else, and that nothing gets out."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from tests.eval.report_folder import SETTINGS, Page, answers, write, write_bench
from vtprune import ConfigError
from vtprune.eval import report_charts as charts
from vtprune.eval.cli import app
from vtprune.eval.report import Pictures, write_report
from vtprune.eval.report_data import read_run
from vtprune.eval.report_page import script_hash
from vtprune.eval.report_tables import COLUMNS, tasks_of

EVIL = "</script><img src=x onerror=alert(1)><script>alert(2)</script>&lt;b>"
WITHOUT = Pictures(wanted=False)


@pytest.fixture(autouse=True)
def no_library(monkeypatch):
    """The library is large and the same everywhere; the browser's test has it."""
    monkeypatch.setattr(charts, "library", lambda: "const Plotly = 1 < 2 && 'plotly';")


@pytest.fixture
def page(tmp_path):
    """Writes the report of some folders without pictures, and reads it."""

    def report(*folders):
        out = tmp_path / "x.html"
        write_report(folders, out, WITHOUT)
        return Page(out.read_text(encoding="utf-8"))

    return report


def test_tables_have_the_figures(tmp_path, page):
    folder = write(tmp_path / "run")
    found = page(folder)
    swept = read_run(folder).swept
    assert swept is not None
    (task,) = tasks_of(swept)
    header, *lines = found.tables["All points of scenes"]
    assert tuple(header) == COLUMNS
    assert [tuple(line) for line in lines] == [row.cells for row in task.rows]
    for kind in task.kinds:
        header, *lines = found.tables[f"scenes, {kind.name} alone"]
        assert [tuple(line) for line in lines] == [row.cells[:7] for row in kind.rows]
    (overview,) = [found.tables[name] for name in found.tables if name.startswith("Right answers")]
    assert overview[0] == ["strategy", "budget", "count (3)", "read (3)"]
    assert overview[4] == ["random", "25%", "33.3 -33.3", "33.3 -66.7"]


def test_charts_and_commands(tmp_path, page):
    found = page(write(tmp_path / "run"), write_bench(tmp_path / "bench"))
    assert list(found.data) == ["s1-1-tokens", "s1-1-FLOPs", "s1-1-time", "s2-bars-1", "s2-bars-2"]
    assert found.data["s1-1-time"]["data"][0]["name"] == "Pareto front"
    assert "vtprune sweep --limit 6" in found.text
    assert "vtprune bench big" in found.text
    assert "vtprune 1, torch 2" in found.text
    assert "Phases, batch 4, 336x336 pixels, 576 visual tokens" in found.tables
    places = {tag[1]["id"] for tag in found.tags if "id" in tag[1]}
    links = [tag[1]["href"] for tag in found.tags if tag[0] == "a"]
    assert len(links) >= 6
    assert {link[1:] for link in links} <= places
    assert set(found.data) <= places


def test_one_folder_may_hold_both(tmp_path, page):
    found = page(write_bench(write(tmp_path / "run")))
    assert {"s1-1-tokens", "s1-bars-1"} <= set(found.data)
    assert sum(tag == "h2" for tag, _ in found.tags) == 1


def test_all_that_is_printed_is_escaped(tmp_path, page):
    names = dict(strategy=EVIL, question=EVIL, expected=EVIL, answer=EVIL, kind=EVIL)
    rows = [*answers(), *(replace(row, **names) for row in answers() if row.budget == "50%")]
    folder = write(tmp_path / "run", replace(SETTINGS, model=EVIL, versions=EVIL, hint=EVIL), rows)
    (folder / "commands.json").write_text(json.dumps([EVIL]))
    settings = {"model": EVIL, "command": EVIL, EVIL: EVIL}
    found = page(folder, write_bench(tmp_path / EVIL.replace("/", "_"), settings=settings))
    assert not [tag for tag in found.tags if tag[0] == "img"]
    assert not [name for _, attributes in found.tags for name in attributes if name[:2] == "on"]
    running = [text for attributes, text in found.scripts if attributes == {}]
    assert len(running) == 2
    assert len(found.scripts) == 2 + len(found.data)
    assert found.text.count(EVIL) >= 6  # as text it is there
    assert EVIL in [line[0] for line in found.tables["All points of scenes"]]
    escaped = "&lt;/script&gt;&lt;img"  # plotly takes some HTML
    line = found.data["s1-1-tokens"]["data"][-1]
    assert line["name"].startswith(escaped)
    assert line["hovertext"][0].startswith(f"<b>{escaped}")
    assert "<img" not in json.dumps(found.data)


def test_it_needs_nothing_else_and_runs_no_other_script(tmp_path, page):
    found = page(write_bench(write(tmp_path / "run")))
    (policy,) = [a["content"] for _, a in found.tags if a.get("http-equiv")]
    assert "default-src 'none'" in policy
    running = [text for attributes, text in found.scripts if attributes == {}]
    allowed = [f"'{script_hash(text)}'" for text in running]
    assert policy.split(";")[1].split() == ["script-src", *allowed]
    assert running[0].startswith("const Plotly = 1 < 2 &&")
    for _, attributes in found.tags:
        for name in ("src", "href", "action", "data"):
            assert attributes.get(name, "#")[:1] == "#" or attributes[name].startswith("data:")


def test_notes_are_in_the_page_and_handed_back(tmp_path):
    folder = write(tmp_path / "run", rows=answers()[:-1])
    notes = write_report([folder], tmp_path / "x.html", WITHOUT)
    found = Page((tmp_path / "x.html").read_text(encoding="utf-8"))
    printed = [note for note in found.notes if "JavaScript" not in note]
    assert sorted(notes) == sorted(f"{folder}: {note}" for note in printed)
    assert any(note.startswith("1 of 6 points") for note in found.notes)
    assert "Pictures were not asked for." in found.notes


def test_commands_that_nobody_wrote_down(tmp_path, page):
    folder = write(tmp_path / "run")
    (folder / "commands.json").unlink()
    assert "The commands were not written down." in page(folder).notes


def test_the_command(tmp_path):
    folder = write(tmp_path / "run")
    result = CliRunner().invoke(app, ["report", str(folder), "--no-overlays"])
    assert result.exit_code == 0, result.output
    assert "report.html (0." in result.output
    assert "Pictures were not asked for" in result.output
    assert (folder / "report.html").stat().st_size > 10_000
    assert not list(folder.glob("*.partial"))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--out", "x.pdf"], "ends in .html"),
        (["--out", "none/x.html"], "a folder that exists"),
        (["--no-overlays", "--samples", "3"], "--samples says what is drawn"),
        (["--no-overlays", "--model", "m"], "--model says what is drawn"),
        (["--samples", "3,x"], "--samples 'x' is no number"),
        (["--samples", "-1"], "--samples '-1' is no number"),
        (["nothing"], "nothing does not exist"),
        (["run/settings.json"], "settings.json is a file"),
    ],
)
def test_errors_are_one_line(tmp_path, monkeypatch, more, said):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "run")
    before = sorted(tmp_path.rglob("*"))
    result = CliRunner().invoke(app, ["report", "run", *more])
    assert result.exit_code == 2
    assert said in result.output
    assert len(result.output.strip().splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_benchmark_has_no_samples(tmp_path):
    with pytest.raises(ConfigError, match="holds no sweep"):
        write_report([write_bench(tmp_path / "b")], tmp_path / "x.html", Pictures(samples=(1,)))


@pytest.mark.parametrize("module", ["plotly.graph_objects", "jinja2"])
def test_a_missing_extra_is_named(tmp_path, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"pip install 'vtprune\[eval\]'"):
        write_report([write(tmp_path / "run")], tmp_path / "x.html", WITHOUT)


def test_out_that_cannot_be_written(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vtprune.eval.report.write_whole", full)
    with pytest.raises(ConfigError, match="cannot be written: No space left"):
        write_report([write(tmp_path / "run")], tmp_path / "x.html", WITHOUT)
