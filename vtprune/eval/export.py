"""Scenes with questions and answers as a parquet file, for other tools."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

from vtprune.errors import ConfigError
from vtprune.eval import scenes
from vtprune.eval._extras import need

ROWS = 256  # per row group, and at most this many in memory
TEXTS = ("kind", "question", "answer", "level", "split")
# What Hugging Face datasets reads from the schema, so that images arrive decoded.
FEATURES = {
    "image": {"_type": "Image"},
    "index": {"dtype": "int64", "_type": "Value"},
    **{name: {"dtype": "string", "_type": "Value"} for name in TEXTS},
}


def write_parquet(
    path: str | Path, n: int, level: str = "standard", split: str = "test", first: int = 0
) -> None:
    """Writes scenes ``first`` to ``first + n - 1``, one row each, with one question about it.

    Columns: ``image``, a struct of ``bytes`` (PNG, 128 x 128) and ``path`` (a file name);
    ``index``, the number of the scene, int64; ``kind`` of the ``question``, and its ``answer``;
    ``level`` and ``split`` of the scene. Equal arguments and equal versions of pyarrow and pillow
    give equal bytes. The file appears under its name when it is whole; until then it is
    ``<name>.partial``.

    Raises:
        ConfigError: ``n``, ``first``, ``level`` or ``split`` is out of range, or ``path`` is not a
            ``.parquet`` file in an existing folder.
        ImportError: pyarrow is not installed.
    """
    path = Path(path)
    _check(path, n, first)
    scenes.make_scene(first, split, level)  # raises before there is a file
    pyarrow = need("pyarrow", extra="eval")
    writer_class = need("pyarrow.parquet", extra="eval").ParquetWriter
    schema = _schema(pyarrow)
    partial = path.with_name(path.name + ".partial")
    try:
        with writer_class(partial, schema, use_dictionary=list(TEXTS)) as writer:
            for start in range(first, first + n, ROWS):
                rows = list(_rows(start, min(start + ROWS, first + n), level, split))
                writer.write_table(pyarrow.Table.from_pylist(rows, schema), row_group_size=ROWS)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _rows(first: int, end: int, level: str, split: str) -> Iterator[dict[str, Any]]:
    for index in range(first, end):
        scene = scenes.make_scene(index, split, level)
        asked = scenes.pick_question(scene, index)
        png = BytesIO()
        scene.image.save(png, "PNG")
        yield {
            "image": {"bytes": png.getvalue(), "path": f"{split}-{level}-{index}.png"},
            "index": index,
            "kind": asked.kind,
            "question": asked.text,
            "answer": asked.answer,
            "level": level,
            "split": split,
        }


def _schema(pyarrow: Any) -> Any:
    image = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    columns = {"image": image, "index": pyarrow.int64()}
    columns |= {name: pyarrow.string() for name in TEXTS}
    features = json.dumps({"info": {"features": FEATURES}})
    return pyarrow.schema(columns, metadata={"huggingface": features})


def _check(path: Path, n: int, first: int) -> None:
    if n < 1:
        raise ConfigError(f"n={n}, but a file needs at least one scene. Give 1 or more.")
    if first < 0:
        raise ConfigError(f"first={first}, but scenes are counted from 0. Give 0 or more.")
    if path.suffix != ".parquet":
        raise ConfigError(f"{path} does not end in .parquet. Give a name such as scenes.parquet.")
    if path.is_dir():
        raise ConfigError(f"{path} is a folder. Give the name of a file.")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        raise ConfigError(
            f"{path} cannot be written: {path.parent} is no folder that can be written. Make it, "
            "or give another."
        )
