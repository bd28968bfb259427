"""Rows of a sweep in files: one JSON object per line, appended as they come, read back strictly."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Generic, TypeVar, get_args, get_type_hints

from vtprune.errors import ConfigError
from vtprune.eval.budgets import Point

R = TypeVar("R", "Answer", "Timing")


@dataclass(frozen=True)
class Answer:
    """One sample at one point: ``tokens`` visual tokens, of which ``kept`` enter a decoder layer.

    ``kept`` is a mean over layers where tokens leave inside the language model. ``flops`` is the
    share of the unpruned prefill that its layers compute, by the published formulas, words and all,
    0 to 1; None where it is not known how they are built.
    """

    task: str
    sample: int
    kind: str
    strategy: str
    budget: str
    question: str
    expected: str
    answer: str
    right: bool
    tokens: int
    kept: float
    flops: float | None = None

    @property
    def point(self) -> Point:
        return Point(self.strategy, self.budget)


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
    types = get_type_hints(kind).items()
    fits = (type(getattr(row, name)) in (get_args(hint) or (hint,)) for name, hint in types)
    return row if all(fits) else None


class JsonLines(Generic[R]):
    """Rows of one kind in a file; they are only ever appended.

    What an interruption left half-written is cut off on opening. Anything else that is no row, and
    all after it, is moved to ``<name>.damaged``, and ``damage`` says so.
    """

    def __init__(self, path: Path, kind: type[R]) -> None:
        self.path = path
        self.damage: str | None = None
        self.rows: list[R] = []
        if path.exists():
            data = path.read_bytes()
            self.rows, good = read_rows(data, kind)
            if good < len(data):
                self._recover(data, good)

    def append(self, rows: Sequence[R]) -> None:
        """Writes ``rows`` and hands them to the operating system.

        Raises:
            ConfigError: they cannot be written; the file is as it was before.
        """
        text = "".join(json.dumps(asdict(row)) + "\n" for row in rows)
        before = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("ab") as file:
                file.write(text.encode())
        except OSError as error:
            if self.path.exists():
                os.truncate(self.path, before)
            raise ConfigError(
                f"{self.path} cannot be written: {error.strerror}. What is in it is whole."
            ) from error
        self.rows += rows

    def _recover(self, data: bytes, good: int) -> None:
        tail = data[good:]
        half_a_row = tail.startswith(b"{") and b"\n" not in tail and b"\0" not in tail
        if not half_a_row:
            aside = _free_name(self.path)
            aside.write_bytes(tail)
            self.damage = (
                f"{self.path} is damaged after line {len(self.rows)}; the rest was moved to "
                f"{aside} and is measured again."
            )
        os.truncate(self.path, good)


def _free_name(path: Path) -> Path:
    """Returns a name for what is set aside, such as ``results.jsonl.damaged``, not yet taken."""
    aside, number = path.with_name(f"{path.name}.damaged"), 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}.damaged-{number}")
    return aside
