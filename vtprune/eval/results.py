"""The folder of a sweep: settings, answers and times, written as they come and resumed."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Generic, TypeVar

from vtprune.errors import ConfigError
from vtprune.eval.budgets import Point

R = TypeVar("R", "Answer", "Timing")


@dataclass(frozen=True)
class Settings:
    """What must be equal for two runs to share a folder."""

    model: str
    fingerprint: str
    task: str
    limit: int
    batch_size: int
    seed: int
    max_new_tokens: int
    device: str
    versions: str


@dataclass(frozen=True)
class Answer:
    """One sample at one point; ``tokens`` visual tokens before, ``kept`` after selection."""

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
    kept: int

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


class JsonLines(Generic[R]):
    """Rows of one kind in a file, one JSON object per line; rows are only ever appended.

    What an interruption left half-written is cut off on opening. Lines that are damaged otherwise,
    and all after them, are moved to ``<name>.damaged``, and ``damage`` says so.
    """

    def __init__(self, path: Path, kind: type[R]) -> None:
        self.path, self.kind = path, kind
        self.damage: str | None = None
        self.rows: list[R] = []
        if path.exists():
            self._recover(path.read_bytes())

    def append(self, rows: Sequence[R]) -> None:
        """Writes ``rows`` in one go and hands them to the operating system."""
        text = "".join(json.dumps(asdict(row)) + "\n" for row in rows)
        with self.path.open("ab", buffering=0) as file:
            file.write(text.encode())
        self.rows += rows

    def _recover(self, data: bytes) -> None:
        good = 0
        for line in data.splitlines(keepends=True):
            row = self._parse(line)
            if row is None:
                break
            self.rows.append(row)
            good += len(line)
        tail = data[good:]
        if b"\n" in tail:
            aside = self.path.with_name(self.path.name + ".damaged")
            aside.write_bytes(tail)
            self.damage = (
                f"{self.path} is damaged after line {len(self.rows)}; the rest was moved to "
                f"{aside} and is measured again."
            )
        if tail:
            with self.path.open("r+b") as file:
                file.truncate(good)

    def _parse(self, line: bytes) -> R | None:
        """Returns the row of a whole, well-formed line, else None."""
        if not line.endswith(b"\n"):
            return None
        try:
            return self.kind(**json.loads(line))
        except (ValueError, TypeError):
            return None


class Folder:
    """``settings.json``, ``results.jsonl`` and ``timings.jsonl`` of one run."""

    def __init__(self, path: Path, settings: Settings) -> None:
        """Opens or begins a run.

        Raises:
            ConfigError: the folder cannot be written, or belongs to a run with other settings.
        """
        self.path, self.settings = path, settings
        check_folder(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"--out {path} cannot be made: {error.strerror}. Give a folder that can be written."
            ) from error
        self._check(settings)
        self.answers = JsonLines(path / "results.jsonl", Answer)
        self.timings = JsonLines(path / "timings.jsonl", Timing)

    @property
    def damage(self) -> list[str]:
        """What was found damaged and set aside."""
        return [note for note in (self.answers.damage, self.timings.damage) if note]

    def done(self) -> dict[tuple[str, Point], set[int]]:
        """Returns the samples already answered, by task and point."""
        found: dict[tuple[str, Point], set[int]] = defaultdict(set)
        for row in self.answers.rows:
            found[row.task, row.point].add(row.sample)
        return found

    def timed(self) -> set[tuple[str, Point, int]]:
        """Returns the batches already timed: task, point and first sample."""
        return {(row.task, row.point, row.first) for row in self.timings.rows}

    def _check(self, settings: Settings) -> None:
        file = self.path / "settings.json"
        wanted = asdict(settings)
        if not file.exists():
            if (self.path / "results.jsonl").exists():
                raise ConfigError(
                    f"{self.path} holds results.jsonl but no settings.json, so it cannot be told "
                    "what was measured. Choose another --out."
                )
            write_whole(file, json.dumps(wanted, indent=2) + "\n")
            return
        found = _read_settings(file)
        names = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
        if names:
            listed = "; ".join(f"{n}: {found.get(n)!r} there, {wanted.get(n)!r} now" for n in names)
            raise ConfigError(
                f"{self.path} holds another run ({listed}). Repeat its settings to resume it, or "
                "choose another --out."
            )


def check_folder(path: Path) -> None:
    """Raises ConfigError when ``path`` is no folder that can be written; makes nothing."""
    found = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not found.is_dir() or not os.access(found, os.W_OK | os.X_OK):
        problem = "cannot be written" if found.is_dir() else "is a file"
        raise ConfigError(f"--out {path}: {found} {problem}. Give a folder that can be written.")


def write_whole(path: Path, text: str) -> None:
    """Writes ``text`` so that an interruption leaves the old file or the new one, never a half."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _read_settings(file: Path) -> dict[str, object]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{file} is damaged; choose another --out.") from error
