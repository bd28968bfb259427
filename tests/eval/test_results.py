from __future__ import annotations

import json
from dataclasses import replace

import pytest

from vtprune import ConfigError
from vtprune.eval.budgets import Point
from vtprune.eval.results import Answer, Folder, JsonLines, Settings, Timing, check_folder

SETTINGS = Settings("m", "f00d", "scenes", 4, 2, 0, 4, "cpu", "torch 2")


def answer(sample, strategy="random"):
    return Answer("scenes", sample, "read", strategy, "25%", "q ?", "3", "4", False, 256, 64)


def test_rows_survive_closing(tmp_path):
    folder = Folder(tmp_path / "new" / "run", SETTINGS)
    folder.answers.append([answer(0), answer(1)])
    folder.answers.append([answer(0, "strided")])
    folder.timings.append([Timing("scenes", "random", "25%", 0, 2, 12.5)])
    again = Folder(tmp_path / "new" / "run", SETTINGS)
    assert again.answers.rows == [answer(0), answer(1), answer(0, "strided")]
    assert again.done() == {
        ("scenes", Point("random", "25%")): {0, 1},
        ("scenes", Point("strided", "25%")): {0},
    }
    assert again.timed() == {("scenes", Point("random", "25%"), 0)}
    assert not again.damage


def test_a_row_says_everything(tmp_path):
    Folder(tmp_path, SETTINGS).answers.append([answer(3)])
    row = json.loads((tmp_path / "results.jsonl").read_text())
    assert list(row) == [
        "task",
        "sample",
        "kind",
        "strategy",
        "budget",
        "question",
        "expected",
        "answer",
        "right",
        "tokens",
        "kept",
    ]


def test_every_cut_leaves_the_whole_lines(tmp_path):
    path = tmp_path / "rows.jsonl"
    JsonLines(path, Answer).append([answer(0), answer(1)])
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for cut in (0, 1, first - 1, first, first + 1, len(whole) - 1, len(whole)):
        path.write_bytes(whole[:cut])
        lines = JsonLines(path, Answer)
        n = whole[:cut].count(b"\n")
        assert [row.sample for row in lines.rows] == list(range(n))
        assert lines.damage is None
        lines.append([answer(i) for i in range(n, 2)])
        assert path.read_bytes() == whole


@pytest.mark.parametrize("damage", [b"\0\0\0\n", b'{"sample": 1}\n', b"[1, 2]\n", b"\xff\xfe\n"])
def test_a_damaged_tail_is_set_aside(tmp_path, damage):
    path = tmp_path / "rows.jsonl"
    JsonLines(path, Answer).append([answer(0)])
    good = path.read_bytes()
    path.write_bytes(good + damage + good)
    lines = JsonLines(path, Answer)
    assert lines.rows == [answer(0)]
    assert path.read_bytes() == good
    assert (tmp_path / "rows.jsonl.damaged").read_bytes() == damage + good
    assert lines.damage is not None
    assert "line 1" in lines.damage
    assert "rows.jsonl.damaged" in lines.damage


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model", "other"),
        ("fingerprint", "beef"),
        ("seed", 1),
        ("task", "clips"),
        ("versions", "torch 3"),
        ("limit", 5),
        ("max_new_tokens", 9),
    ],
)
def test_another_run_is_refused_with_the_difference(tmp_path, name, value):
    Folder(tmp_path, SETTINGS).answers.append([answer(0)])
    before = (tmp_path / "results.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=name) as caught:
        Folder(tmp_path, replace(SETTINGS, **{name: value}))
    assert repr(value) in str(caught.value)
    assert repr(getattr(SETTINGS, name)) in str(caught.value)
    assert (tmp_path / "results.jsonl").read_bytes() == before


def test_results_without_settings_are_refused(tmp_path):
    (tmp_path / "results.jsonl").write_text("")
    with pytest.raises(ConfigError, match=r"no settings\.json"):
        Folder(tmp_path, SETTINGS)


def test_damaged_settings_are_refused(tmp_path):
    (tmp_path / "settings.json").write_text('{"model": ')
    with pytest.raises(ConfigError, match="damaged"):
        Folder(tmp_path, SETTINGS)


def test_a_file_is_no_folder(tmp_path):
    file = tmp_path / "file"
    file.touch()
    for path in (file, file / "below"):
        with pytest.raises(ConfigError, match="is a file"):
            check_folder(path)
    check_folder(tmp_path / "a" / "b")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
