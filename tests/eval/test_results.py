from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, replace

import pytest

from vtprune import ConfigError
from vtprune.eval.budgets import Point
from vtprune.eval.results import Folder, Settings, check_folder
from vtprune.eval.rows import Answer, JsonLines, Timing, write_whole

SETTINGS = Settings("m", "f00d", "scenes", "", 4, 2, 0, 4, "cpu", "torch 2")


def answer(sample, strategy="random"):
    return Answer("scenes", sample, "read", strategy, "25%", "q ?", "3", "4", False, 256, 64.0)


def test_rows_survive_closing(tmp_path):
    folder = Folder(tmp_path / "new" / "run", SETTINGS)
    folder.answers.append([answer(0), answer(1)])
    folder.answers.append([answer(0, "strided")])
    folder.timings.append([Timing("scenes", "random", "25%", 0, 2, 12.5)])
    folder.close()
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
        "flops",
        "cache",
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
        assert lines.damage == []
        lines.append([answer(i) for i in range(n, 2)])
        assert path.read_bytes() == whole


WRONG_TYPES = [{"sample": "0"}, {"right": 0}, {"strategy": []}, {"tokens": 1.5}, {"answer": None}]
WRONG_TYPES += [{"flops": 1}, {"flops": "1.0"}]
DAMAGED = [b"\0\0\0\n", b'{"sample": 1}\n', b"[1, 2]\n", b"\xff\xfe\n"]
DAMAGED += [json.dumps(asdict(answer(0)) | wrong).encode() + b"\n" for wrong in WRONG_TYPES]


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_tail_is_set_aside(tmp_path, damage):
    path = tmp_path / "rows.jsonl"
    JsonLines(path, Answer).append([answer(0)])
    good = path.read_bytes()
    path.write_bytes(good + damage + good)
    lines = JsonLines(path, Answer)
    assert lines.rows == [answer(0)]
    assert path.read_bytes() == good
    assert (tmp_path / "rows.jsonl.damaged").read_bytes() == damage + good
    (said,) = lines.damage
    assert "line 1" in said
    assert "rows.jsonl.damaged" in said


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
    folder = Folder(tmp_path, SETTINGS)
    folder.answers.append([answer(0)])
    folder.close()
    before = (tmp_path / "results.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=name) as caught:
        Folder(tmp_path, replace(SETTINGS, **{name: value}))
    assert repr(value) in str(caught.value)
    assert repr(getattr(SETTINGS, name)) in str(caught.value)
    assert (tmp_path / "results.jsonl").read_bytes() == before


@pytest.mark.parametrize("name", ["results.jsonl", "timings.jsonl", "results.rank-1.jsonl"])
def test_rows_without_settings_are_refused(tmp_path, name):
    (tmp_path / name).write_text("")
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


def test_a_second_damage_keeps_what_the_first_set_aside(tmp_path):
    path = tmp_path / "rows.jsonl"
    for i, junk in enumerate((b"first\n", b"second\n", b"no end")):
        path.write_bytes(junk)
        lines = JsonLines(path, Answer)
        assert lines.damage
        assert len(list(tmp_path.glob("*.damaged*"))) == i + 1
    assert {p.read_bytes() for p in tmp_path.glob("*.damaged*")} == {
        b"first\n",
        b"second\n",
        b"no end",
    }


FULL = """
import resource, signal, sys
from pathlib import Path
from tests.eval.test_results import answer
from vtprune import ConfigError
from vtprune.eval.rows import Answer, JsonLines

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
lines = JsonLines(Path(sys.argv[1]), Answer)
lines.append([answer(0)])
resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))
try:
    lines.append([answer(1), answer(2)])
except ConfigError as error:
    print(error, len(lines.rows))
"""


def test_a_full_disk_is_said_and_leaves_whole_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(path)], capture_output=True, text=True, check=True
    )
    assert "cannot be written: File too large" in done.stdout
    assert done.stdout.endswith("1\n")
    assert JsonLines(path, Answer).rows == [answer(0)]


def test_one_process_at_a_time(tmp_path):
    first = Folder(tmp_path, SETTINGS)
    with pytest.raises(ConfigError, match="Another sweep is writing"):
        Folder(tmp_path, SETTINGS)
    first.close()
    Folder(tmp_path, SETTINGS).close()


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(ConfigError, match="cannot be written"):
        check_folder(tmp_path / "new")
    with pytest.raises(ConfigError, match="too long"):
        check_folder(tmp_path / ("x" * 300))


def test_a_folder_of_another_version_is_refused(tmp_path):
    (tmp_path / "settings.json").write_text('{"model": "m"}')
    with pytest.raises(ConfigError, match=r"another version of vtprune.*kept, flops, cache\)"):
        Folder(tmp_path, SETTINGS)


def test_a_folder_with_other_columns_is_refused(tmp_path):
    Folder(tmp_path, SETTINGS).close()
    file = tmp_path / "settings.json"
    file.write_text(file.read_text().replace(", flops", ""))
    with pytest.raises(ConfigError, match="another version of vtprune"):
        Folder(tmp_path, SETTINGS)


def test_a_share_that_is_not_known_survives(tmp_path):
    rows = [answer(0), replace(answer(1), flops=0.25)]
    JsonLines(tmp_path / "rows.jsonl", Answer).append(rows)
    assert JsonLines(tmp_path / "rows.jsonl", Answer).rows == rows


def test_a_folder_in_place_of_a_file(tmp_path):
    Folder(tmp_path, SETTINGS).close()
    (tmp_path / "timings.jsonl").mkdir()
    for _ in range(2):  # a folder that could not be opened is not locked
        with pytest.raises(ConfigError, match="cannot be used"):
            Folder(tmp_path, SETTINGS)


def test_write_whole_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_whole(path, "old\n")
    monkeypatch.setattr("os.fsync", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_whole(path, "new\n")
    assert path.read_text() == "old\n"
