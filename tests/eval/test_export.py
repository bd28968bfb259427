from __future__ import annotations

import io
import json
import os
import sys

import numpy as np
import pytest
from PIL import Image

from vtprune.errors import ConfigError
from vtprune.eval import export, scenes
from vtprune.eval.export import write_parquet

parquet = pytest.importorskip("pyarrow.parquet")


def rows_of(path):
    return parquet.read_table(path).to_pylist()


@pytest.mark.parametrize(
    ("level", "split", "first"), [("standard", "test", 0), ("hard", "train", 41)]
)
def test_rows_are_the_scenes(tmp_path, level, split, first):
    path = tmp_path / "scenes.parquet"
    write_parquet(path, 9, level=level, split=split, first=first)
    rows = rows_of(path)
    assert [row["index"] for row in rows] == list(range(first, first + 9))
    for row in rows:
        scene = scenes.make_scene(row["index"], split, level)
        asked = scenes.pick_question(scene, row["index"])
        with Image.open(io.BytesIO(row["image"]["bytes"])) as picture:
            assert picture.format == "PNG"
            np.testing.assert_array_equal(np.asarray(picture), scene.pixels)
        assert (row["kind"], row["question"], row["answer"]) == (
            *(asked.kind, asked.text, asked.answer),
        )
    assert len({row["image"]["path"] for row in rows}) == 9
    assert list(tmp_path.iterdir()) == [path]


def test_the_schema_says_what_the_columns_are(tmp_path):
    write_parquet(str(tmp_path / "scenes.parquet"), 1)
    schema = parquet.read_schema(tmp_path / "scenes.parquet")
    assert {name: str(schema.field(name).type) for name in schema.names} == {
        "image": "struct<bytes: binary, path: string>",
        "index": "int64",
        "kind": "string",
        "question": "string",
        "answer": "string",
        "level": "string",
        "split": "string",
    }
    features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    assert list(features) == schema.names
    assert features["image"] == {"_type": "Image"}
    assert features["index"] == {"dtype": "int64", "_type": "Value"}


def test_row_groups_do_not_change_the_rows(tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole.parquet", tmp_path / "parts.parquet"
    write_parquet(whole, 7)
    monkeypatch.setattr(export, "ROWS", 3)
    write_parquet(parts, 7)
    assert [parquet.ParquetFile(path).num_row_groups for path in (whole, parts)] == [1, 3]
    assert rows_of(whole) == rows_of(parts)


def test_the_same_arguments_give_the_same_bytes(tmp_path):
    one, two = tmp_path / "one.parquet", tmp_path / "two.parquet"
    for path in (one, two):
        write_parquet(path, 5, first=3)
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("a.parquet", {"n": 0}, "n=0, but a file needs at least one scene"),
        ("a.parquet", {"n": -1}, "n=-1"),
        ("a.parquet", {"first": -1}, "first=-1, but scenes are counted from 0"),
        ("a.parquet", {"level": "harder"}, "level='harder' is not known"),
        ("a.parquet", {"split": "dev"}, "split='dev' is not known"),
        ("a.csv", {}, "does not end in .parquet"),
        ("a", {}, "does not end in .parquet"),
        ("folder.parquet", {}, "is a folder. Give the name of a file"),
        ("absent/a.parquet", {}, "absent is no folder that can be written. Make it"),
    ],
)
def test_errors_leave_no_file(tmp_path, name, options, said):
    (tmp_path / "folder.parquet").mkdir()
    with pytest.raises(ConfigError, match=said.replace(".", r"\.")):
        write_parquet(tmp_path / name, **{"n": 2, **options})
    assert [path.name for path in tmp_path.iterdir()] == ["folder.parquet"]


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *args: False)
    with pytest.raises(ConfigError, match="no folder that can be written"):
        write_parquet(tmp_path / "a.parquet", 1)


def test_an_interruption_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "scenes.parquet"
    write_parquet(path, 2)
    before = path.read_bytes()
    make = scenes.make_scene

    def interrupted(seed, *rest):
        if seed == 4:
            raise KeyboardInterrupt
        return make(seed, *rest)

    monkeypatch.setattr(export, "ROWS", 3)
    monkeypatch.setattr(scenes, "make_scene", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_parquet(path, 9)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"pyarrow is not installed.*'vtprune\[eval\]'"):
        write_parquet(tmp_path / "scenes.parquet", 1)
    assert not list(tmp_path.iterdir())
