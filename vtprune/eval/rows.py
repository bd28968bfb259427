"""Rows of a sweep in files: one JSON object per line, appended as they come, read back strictly."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar, get_args, get_type_hints

from vtprune.errors import ConfigError
from vtprune.eval.budgets import Point

Key = tuple[str, Point, int]  # task, point, number of the first sample: what no two rows share


class Row(Protocol):
    """A dataclass that says what it is about."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def key(self) -> Key: ...


R = TypeVar("R", bound=Row)


@dataclass(frozen=True)
class Answer:
    """One sample at one point: ``tokens`` visual tokens, of which ``kept`` enter a decoder layer.

    ``kept`` is a mean over layers where tokens leave inside the language model. ``flops`` is the
    share of the unpruned prefill that its layers compute, by the published formulas, words and all,
    0 to 1; None where it is not known how they are built. ``cache`` is the share of the unpruned
    cache's bytes that the batch's holds after the prefill, padding and all; None where there is
    none of a known kind. Where a task gives marks, ``right`` is a share, 0 to 1.
    """

    task: str
    sample: int
    kind: str
    strategy: str
    budget: str
    question: str
    expected: str
    answer: str
    right: bool | float
    tokens: int
    kept: float
    flops: float | None = None
    cache: float | None = None

    @property
    def point(self) -> Point:
        return Point(self.strategy, self.budget)

    @property
    def key(self) -> Key:
        return self.task, self.point, self.sample


@dataclass(frozen=True)
class Timing:
    """One batch at one point; ``first`` is its first sample, ``ms`` the time of ``generate``."""

    task: str
    strategy: str
    budget: str
    first: int
    size: int
    ms: float

    @property
    def point(self) -> Point:
        return Point(self.strategy, self.budget)

    @property
    def key(self) -> Key:
        return self.task, self.point, self.first


def read_rows(data: bytes, kind: type[R]) -> tuple[list[R], int]:
    """Returns the rows up to the first line that is no whole row, and the bytes they take."""
    rows: list[R] = []
    good = 0
    for line in data.splitlines(keepends=True):
        row = _parse(line, kind)
        if row is None:
            break
        rows.append(row)
        good += len(line)
    return rows, good


def _parse(line: bytes, kind: type[R]) -> R | None:
    if not line.endswith(b"\n"):
        return None
    try:
        row = kind(**json.loads(line))
    except (ValueError, TypeError):
        return None
    fits = (type(getattr(row, name)) in allowed for name, allowed in _types(kind).items())
    return row if all(fits) else None


@cache
def _types(kind: type[Any]) -> dict[str, tuple[Any, ...]]:
    """Returns the types that each field may have."""
    return {name: get_args(hint) or (hint,) for name, hint in get_type_hints(kind).items()}


class JsonLines(Generic[R]):
    """Rows of one kind in a file, none twice; new ones are appended.

    Of several ranks each but the first appends to a file of its own beside it, and reads from the
    common one; ``gather`` puts all into that.

    What an interruption left half-written is cut off on opening. Anything else that is no row, and
    all after it, is moved to ``<name>.damaged``, and ``damage`` says so.
    """

    def __init__(self, path: Path, kind: type[R], rank: int = 0) -> None:
        self.path, self.kind = path, kind
        self.damage: list[str] = []
        self._own = path.with_suffix(f".rank-{rank}{path.suffix}") if rank else path
        self._rows: dict[Key, R] = {}
        self._read(path)

    @property
    def rows(self) -> list[R]:
        """The rows that were read and those that this process has appended."""
        return list(self._rows.values())

    def append(self, rows: Sequence[R]) -> None:
        """Writes those of ``rows`` that are new and hands them to the operating system.

        Raises:
            ConfigError: they cannot be written; the file is as it was before.
        """
        new = [row for row in rows if row.key not in self._rows]
        before = self._own.stat().st_size if self._own.exists() else 0
        try:
            with self._own.open("ab") as file:
                file.write(_text(new).encode())
        except OSError as error:
            if self._own.exists():
                os.truncate(self._own, before)
            raise _unwritten(self._own, error) from error
        self._rows |= {row.key: row for row in new}

    def gather(self, order: Callable[[R], Any] | None = None) -> None:
        """Puts in what other ranks have written, and all rows in order; for the first rank.

        The whole file takes the place of the old one before the others are removed, so that what
        ends in between is done by the next call.

        Raises:
            ConfigError: the file cannot be written; all are as they were before.
        """
        parts = sorted(self.path.parent.glob(f"{self.path.stem}.rank-*{self.path.suffix}"))
        for part in parts:
            self._read(part)
        rows = self.rows if order is None else sorted(self.rows, key=order)
        self._rows = {row.key: row for row in rows}
        text = _text(rows)
        try:
            if text.encode() != (self.path.read_bytes() if self.path.exists() else b""):
                write_whole(self.path, text)
            for part in parts:
                part.unlink()
        except OSError as error:
            raise _unwritten(self.path, error) from error

    def _read(self, path: Path) -> None:
        if path.exists():
            data = path.read_bytes()
            rows, good = read_rows(data, self.kind)
            if good < len(data):
                self._recover(path, data, good)
            for row in rows:
                self._rows.setdefault(row.key, row)

    def _recover(self, path: Path, data: bytes, good: int) -> None:
        tail = data[good:]
        half_a_row = tail.startswith(b"{") and b"\n" not in tail and b"\0" not in tail
        if not half_a_row:
            aside, line = _free_name(path), data[:good].count(b"\n")
            aside.write_bytes(tail)
            self.damage.append(
                f"{path} is damaged after line {line}; the rest was moved to {aside} and is "
                "measured again."
            )
        os.truncate(path, good)


def write_whole(path: Path, text: str) -> None:
    """Writes ``text`` so that an interruption leaves the old file or the new one, never a half."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())  # on the disk before it replaces what is
    partial.replace(path)


def _text(rows: Sequence[Row]) -> str:
    return "".join(json.dumps(asdict(row)) + "\n" for row in rows)


def _unwritten(path: Path, error: OSError) -> ConfigError:
    return ConfigError(f"{path} cannot be written: {error.strerror}. What is in it is whole.")


def _free_name(path: Path) -> Path:
    """Returns a name for what is set aside, such as ``results.jsonl.damaged``, not yet taken."""
    aside, number = path.with_name(f"{path.name}.damaged"), 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}.damaged-{number}")
    return aside
